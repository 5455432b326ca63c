"""State that users read and change, and input that torch refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from backends import BACKENDS
from parity import (
    ALL,
    OURS,
    SHARED,
    TORCH,
    assert_bits,
    assert_same_as_torch,
    detached,
    give,
    parameters,
    values,
)
from tolerances import MANY_STEPS

import nesterov_pp as npp

# ---------------------------------------------------------------------- state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step", "mu_product"])
@pytest.mark.parametrize("way", ["replaced", "in place", "through .data"])
def test_every_entry_of_the_state_that_is_set_by_hand_takes_effect(name, key, way, backend):
    if name == "AdamW" and key == "mu_product":
        pytest.skip("AdamW has none")

    def scenario(make):
        ps = parameters()
        optimizer = make(ps)
        for t in range(6):
            if t == 3:
                entry = optimizer.state[ps[1]]
                new = entry[key] * 0.5 + 0.25 if key != "step" else entry[key] + 5
                if way == "replaced":
                    entry[key] = new
                elif way == "in place":
                    entry[key].copy_(new)
                else:
                    entry[key].data = new
            give(ps, t)
            optimizer.step()
        return [*detached(ps), optimizer.state[ps[1]][key]]

    assert_same_as_torch(name, scenario, backend=backend)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("way", ["clear", "pop", "del", "empty"])
def test_state_taken_away_starts_afresh(name, way):
    def scenario(make):
        ps = parameters()
        optimizer = make(ps)
        for t in range(6):
            if t == 3:
                if way == "clear":
                    optimizer.state.clear()
                elif way == "pop":
                    optimizer.state.pop(ps[1])
                elif way == "del":
                    del optimizer.state[ps[1]]
                else:
                    optimizer.state[ps[1]] = {}
            give(ps, t)
            optimizer.step()
        return detached(ps)

    assert_same_as_torch(name, scenario)


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_masters_put_in_the_place_of_parameters_before_their_first_step(name, stepped):
    """Half-precision wrappers do this: one flat float32 tensor replaces all parameters of a group."""
    results = []
    for make in (TORCH[name], OURS[name]):
        optimizer = make(parameters(torch.bfloat16))
        whole = optimizer.param_groups[0]["params"]
        flat = torch.nn.Parameter(torch.cat([p.detach().float().flatten() for p in whole]))
        optimizer.param_groups[0]["params"] = [flat]
        for t in range(3 * stepped):
            give([flat], t)
            optimizer.step()
            assert list(optimizer.state) == [flat]
        saved = optimizer.state_dict()
        # Our optimizers have state before the first step.
        assert saved["state"].keys() == ({0} if stepped or make is OURS[name] else set())
        make([flat.detach().clone().requires_grad_()]).load_state_dict(saved)
        results.append(flat.detach())
    torch.testing.assert_close(results[1], results[0], **MANY_STEPS[torch.float32])


@pytest.mark.parametrize("name", SHARED)
def test_own_entries_in_the_state_are_left_alone_and_saved(name):
    ps = parameters()
    optimizer = OURS[name](ps)
    optimizer.state[ps[0]]["note"] = 7
    optimizer.state[ps[0]]["mean"] = torch.zeros(7)
    give(ps, 0)
    optimizer.step()
    again = OURS[name](parameters())
    again.load_state_dict(optimizer.state_dict())
    entry = again.state[again.param_groups[0]["params"][0]]
    assert entry["note"] == 7
    assert torch.equal(entry["mean"], torch.zeros(7))
    give(again.param_groups[0]["params"], 1)
    again.step()


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_state_has_torchs_dtypes_and_layouts(name, default, dtype):
    torch.set_default_dtype(default)
    try:
        entries = []
        for make in (OURS[name], TORCH[name]):
            p = torch.nn.Parameter(torch.ones(3, 4, dtype=dtype).t())
            optimizer = make([p])
            give([p], 0)
            optimizer.step()
            entries.append({k: (v.dtype, v.shape, v.stride()) for k, v in optimizer.state[p].items()})
    finally:
        torch.set_default_dtype(torch.float32)
    ours, theirs = entries
    if dtype in (torch.float64, torch.complex128) and name == "NAdam":
        # Our product of mu is kept in double here, torch's in the default dtype.
        assert ours.pop("mu_product")[0] == torch.float64
        theirs.pop("mu_product")
    assert ours == theirs


@pytest.mark.parametrize("name", SHARED)
def test_a_parameter_that_never_had_a_gradient_goes_through_checkpoints_both_ways(name):
    """torch has no state for such a parameter, ours an untouched one; each understands the other's."""

    def one(make, saved=None):
        ps = parameters()
        optimizer = make(ps)
        if saved is not None:
            optimizer.load_state_dict(saved)
            give(ps, 1)
            optimizer.step()
            return ps
        give(ps[:2], 0)
        optimizer.step()
        return copy.deepcopy(optimizer.state_dict())

    ours, theirs = one(OURS[name]), one(TORCH[name])
    results = [one(make, copy.deepcopy(saved)) for make in (OURS[name], TORCH[name]) for saved in (ours, theirs)]
    for result in results[1:]:
        torch.testing.assert_close(detached(result), detached(results[0]), **MANY_STEPS[torch.float32])


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("number", [int, float])
@pytest.mark.parametrize("load", ["load_state_dict", "__setstate__"])
def test_old_step_counts_and_groups_have_the_dtypes_that_torch_gives_them(name, number, load):
    keys = ["maximize", "foreach", "capturable", "differentiable", "fused", "amsgrad"]
    keys += ["decoupled_weight_decay"] if name == "NAdam" else []
    results = []
    for make in (OURS[name], TORCH[name]):
        ps = parameters()
        optimizer = make(ps)
        for t in range(2):
            give(ps, t)
            optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        for entry in saved["state"].values():
            entry["step"] = number(entry["step"])
            if "mu_product" in entry:
                entry["mu_product"] = float(entry["mu_product"])
        for group in saved["param_groups"]:
            for key in keys:
                group.pop(key, None)
        if load == "load_state_dict":
            optimizer.load_state_dict(saved)
        else:
            group = {**saved["param_groups"][0], "params": ps}
            state = {p: saved["state"][i] for i, p in enumerate(ps)}
            optimizer.__setstate__({"state": state, "param_groups": [group]})
        give(ps, 2)
        optimizer.step()
        group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        results.append((detached(ps), group, {k: v.dtype for k, v in optimizer.state[ps[0]].items()}))
    torch.testing.assert_close(results[0][0], results[1][0], **MANY_STEPS[torch.float32])
    assert results[0][1:] == results[1][1:]


# ---------------------------------------------------------------------- input that torch refuses


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("foreach", [None, False])
def test_capturable_on_the_cpu_is_refused_in_torchs_own_words(name, foreach):
    messages = []
    for make in (TORCH[name], OURS[name]):
        ps = parameters()
        optimizer = make(ps, capturable=True, foreach=foreach)
        give(ps, 0)
        with pytest.raises(AssertionError) as error:
            optimizer.step()
        messages.append(str(error.value))
    assert_bits(detached(ps), values())
    assert all(float(s["step"]) == 0 and not s["exp_avg"].any() for s in optimizer.state.values())
    assert messages[1] == messages[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_sparse_gradient_anywhere_changes_nothing(name, at, backend):
    ps = [torch.nn.Parameter(torch.ones(4, 2)) for _ in range(3)]
    optimizer = OURS[name](ps, backend=backend)
    give(ps, 0)
    optimizer.step()
    before, state = [p.detach().clone() for p in ps], copy.deepcopy(optimizer.state_dict())
    ps[at].grad = torch.eye(4, 2).to_sparse()
    sentence = {
        "NAdam": "NAdam does not support sparse gradients",
        "AdamW": "Adam does not support sparse gradients, please consider SparseAdam instead",
        "NAG": "NAG does not support sparse gradients",
    }[name]
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    assert str(error.value) == sentence
    assert_bits(detached(ps), before)
    assert str(state) == str(optimizer.state_dict())
    give(ps, 1)
    optimizer.step()
    assert all(float(s["step"]) == 2 for s in optimizer.state.values())


def test_the_gradient_of_a_sparse_embedding_is_refused_in_torchs_words():
    for module in (torch.optim, npp):
        table = torch.nn.Embedding(5, 3, sparse=True)
        optimizer = module.NAdam(table.parameters())
        table(torch.tensor([1, 3])).sum().backward()
        with pytest.raises(RuntimeError, match=r"^NAdam does not support sparse gradients$"):
            optimizer.step()


@pytest.mark.parametrize(
    "options", [{"fused": True, "foreach": True}, {"fused": True, "differentiable": True}], ids=str
)
def test_adamw_refuses_the_pairs_that_torch_refuses(options):
    messages = []
    for module in (torch.optim, npp):
        with pytest.raises(RuntimeError) as error:
            module.AdamW(parameters(), **options)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
