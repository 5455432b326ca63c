"""More uses of torch.optim: the constructor, groups and names, hooks."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from backends import BACKENDS
from parity import (
    ALL,
    GAMMA,
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

import nesterov_pp as npp

# ---------------------------------------------------------------------- the constructor


@pytest.mark.parametrize("name", SHARED)
def test_methods_take_what_torchs_take(name):
    for method in ("step", "zero_grad", "add_param_group", "load_state_dict", "state_dict"):
        ours = list(inspect.signature(getattr(getattr(npp, name), method)).parameters.values())
        theirs = list(inspect.signature(getattr(getattr(torch.optim, name), method)).parameters.values())
        described = [(p.name, p.kind, p.default) for p in ours]
        assert described[: len(theirs)] == [(p.name, p.kind, p.default) for p in theirs]
        assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in described[len(theirs) :])


@pytest.mark.parametrize("name", SHARED)
def test_defaults_groups_and_words_are_torchs(name):
    ours, theirs = getattr(npp, name)(parameters()), getattr(torch.optim, name)(parameters())
    assert ours.defaults == theirs.defaults
    assert list(ours.param_groups[0]) == list(theirs.param_groups[0])
    assert repr(ours) == repr(theirs)
    assert isinstance(ours.state, type(theirs.state))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "bad",
    [
        lambda cls: cls(parameters()[0]),
        lambda cls: cls([]),
        lambda cls: cls([{"params": []}, 3]),
        lambda cls: cls([None]),
        lambda cls: cls([parameters()[0] * 2]),
        lambda cls: cls([("a", parameters()[0]), parameters()[1]]),
        lambda cls: (lambda p: cls([{"params": [p]}, {"params": [p]}]))(parameters()[0]),
        lambda cls: cls(parameters()).add_param_group(parameters()),
        lambda cls: cls(parameters()).add_param_group({"params": set(parameters())}),
        lambda cls: cls([("a", parameters()[0])]).add_param_group({"params": parameters()}),
    ],
    ids=["tensor", "empty", "number", "none", "no leaf", "half named", "twice", "list", "set", "unnamed"],
)
def test_bad_parameters_are_refused_as_torch_refuses_them(name, bad):
    with pytest.raises((TypeError, ValueError)) as theirs:
        bad(TORCH[name])
    with pytest.raises(type(theirs.value)) as ours:
        bad(OURS[name])
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("kind", ["floats", "tensors", "a list"])
def test_adamw_takes_the_betas_that_torch_takes(kind):
    betas = {"floats": (0.8, 0.9), "tensors": (torch.tensor(0.8), torch.tensor(0.9)), "a list": [0.8, 0.9]}[kind]

    def scenario(make):
        ps = parameters()
        optimizer = make(ps, betas=betas)
        for t in range(4):
            give(ps, t)
            optimizer.step()
        return [*detached(ps), torch.tensor(optimizer.param_groups[0]["betas"])]

    assert_same_as_torch("AdamW", scenario)


@pytest.mark.parametrize("name", SHARED)
def test_tensor_rate_is_kept_as_it_is(name):
    """One tensor serves all groups, as in torch; after a checkpoint it is no longer shared."""

    def scenario(make):
        ps, rate = parameters(), torch.tensor(3e-2)
        optimizer = make([{"params": ps[:1]}, {"params": ps[1:]}], lr=rate)
        assert all(group["lr"] is rate for group in optimizer.param_groups)
        for t in range(3):
            give(ps, t)
            optimizer.step()
            rate.mul_(0.5)
        optimizer.load_state_dict(optimizer.state_dict())
        rate.fill_(7.0)
        for t in range(3, 5):
            give(ps, t)
            optimizer.step()
        return detached(ps)

    assert_same_as_torch(name, scenario)


# ---------------------------------------------------------------------- groups and names


@pytest.mark.parametrize("name", ALL)
def test_names_in_groups_and_checkpoints(name):
    def scenario(make):
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        optimizer = make([{"params": list(model[0].named_parameters())}])
        optimizer.add_param_group({"params": [("1." + n, p) for n, p in model[1].named_parameters()]})
        saved = copy.deepcopy(optimizer.state_dict())
        names = [group["param_names"] for group in saved["param_groups"]]
        saved["param_groups"][0]["param_names"] = ["w", "b"]
        del saved["param_groups"][1]["param_names"]
        optimizer.load_state_dict(saved)
        return [*names, *(group["param_names"] for group in optimizer.param_groups)]

    assert scenario(OURS[name]) == scenario(TORCH[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
def test_groups_that_come_and_go(name, backend):
    """Groups are added (also with a bare tensor), appended to, removed and reordered."""

    def scenario(make):
        torch.manual_seed(0)
        ps = [*parameters(), *(torch.nn.Parameter(torch.randn(3)) for _ in range(3))]
        optimizer = make([{"params": ps[:2], "maximize": True}])
        for t in range(14):
            if t == 2:
                optimizer.add_param_group({"params": ps[2], "foreach": False})
            if t == 4:
                optimizer.add_param_group({"params": iter(ps[3:5])})
            if t == 6:
                optimizer.param_groups[1]["params"].append(ps[5])
            if t == 8:
                optimizer.param_groups.reverse()
            if t == 10:
                optimizer.param_groups[0]["params"].pop()
            if t == 12:
                del optimizer.param_groups[1]
            give(ps, t)
            optimizer.step()
        return detached(ps)

    assert_same_as_torch(name, scenario, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("when", ["never", "sometimes", "all at times", "no requires_grad"])
def test_gradients_that_are_missing(name, when, backend):
    def scenario(make):
        ps = parameters()
        ps[1].requires_grad_(when != "no requires_grad")
        optimizer = make(ps)
        for t in range(9):
            give(ps, t)
            if when == "never" or (when == "sometimes" and t % 3 != 1):
                ps[0].grad = None
            if when == "all at times" and t % 2:
                for p in ps:
                    p.grad = None
            optimizer.step()
        return detached(ps)

    assert_same_as_torch(name, scenario, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("NAdam", {"momentum_decay": 0.3}),
        ("NAdam", {"decoupled_weight_decay": True, "weight_decay": 0.2}),
        ("NAdam", {"weight_decay": 0.2, "maximize": True}),
        ("NAdam", {"betas": [0.3, 0.4]}),
        ("NAdam", {"lr": torch.tensor(0.05)}),
        ("NAdam", {"foreach": True}),
        ("AdamW", {"lr": 0.0}),
        ("AdamW", {"betas": (0.0, 0.0)}),
        ("AdamW", {"eps": 0.5}),
    ],
    ids=str,
)
def test_more_hyperparameters_changed_between_steps(name, change, backend):
    def scenario(make):
        ps = parameters()
        optimizer = make(ps)
        for t in range(8):
            if t == 3:
                optimizer.param_groups[0].update(change)
            give(ps, t)
            optimizer.step()
        return detached(ps)

    assert_same_as_torch(name, scenario, backend=backend)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("change", [{"lr": 0.05}, {"maximize": True}])
def test_nag_and_others_follow_changed_options(name, change):
    def scenario(make):
        ps = parameters()
        optimizer = make(ps, lr=0.01)
        for t in range(8):
            if t == 3:
                factor = (1 - GAMMA) if isinstance(optimizer, torch.optim.SGD) else 1.0
                optimizer.param_groups[0].update({k: v * factor if k == "lr" else v for k, v in change.items()})
            give(ps, t)
            optimizer.step()
        return detached(ps)

    assert_same_as_torch(name, scenario)


# ---------------------------------------------------------------------- hooks


@pytest.mark.parametrize("name", ALL)
def test_hooks_may_change_what_goes_through_them(name):
    """A step hook may replace the arguments, a save hook the result, and a load hook the state that is read."""

    def scenario(make):
        ps = parameters()
        optimizer = make(ps, lr=0.01)
        calls = []

        def closure():
            calls.append(torch.is_grad_enabled())
            give(ps, len(calls))
            return torch.tensor(float(len(calls)))

        handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure), {}))
        losses = [optimizer.step(), optimizer.step()]
        handle.remove()

        def halve(_, saved):
            return {**saved, "param_groups": [{**g, "lr": g["lr"] / 2} for g in saved["param_groups"]]}

        optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "note": "mine"})
        saved = optimizer.state_dict()
        assert saved["note"] == "mine"
        optimizer.register_load_state_dict_pre_hook(halve)
        optimizer.load_state_dict(saved)
        assert calls == [True, True]
        give(ps, 9)
        optimizer.step()
        return [*losses, *detached(ps)]

    assert_same_as_torch(name, scenario)


@pytest.mark.parametrize("name", ALL)
def test_a_load_hook_may_prepare_a_state_that_would_be_refused(name):
    """Users are told to do this for checkpoints of a model that has changed since."""
    ps = parameters()
    optimizer = OURS[name](ps)
    saved = optimizer.state_dict()
    saved["param_groups"].append({"params": []})
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(saved)
    optimizer.register_load_state_dict_pre_hook(lambda o, s: {**s, "param_groups": s["param_groups"][:1]})
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize("name", ALL)
def test_the_profiler_shows_steps_and_zero_grads(name):
    ps = parameters()
    optimizer = getattr(npp, name)(ps)
    give(ps, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    seen = {event.key for event in profile.key_averages()}
    assert f"Optimizer.step#{name}.step" in seen
    assert f"Optimizer.zero_grad#{name}.zero_grad" in seen


@pytest.mark.parametrize("name", ALL)
def test_a_closure_sees_gradients_enabled_and_gives_its_loss(name):
    def scenario(make):
        ps = parameters()
        optimizer = make(ps)
        losses = []
        for _ in range(4):
            with torch.no_grad():

                def closure():
                    optimizer.zero_grad()
                    loss = sum((p**2).sum() for p in ps)
                    loss.backward()
                    return loss

                losses.append(optimizer.step(closure).detach())
                assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
        return [*losses, *detached(ps)]

    assert_same_as_torch(name, scenario)


@pytest.mark.parametrize("name", ALL)
def test_a_closure_that_raises_leaves_everything_as_it_was(name):
    ps = parameters()
    optimizer = OURS[name](ps)
    give(ps, 0)

    def closure():
        raise KeyError("mine")

    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(KeyError, match="mine"):
        optimizer.step(closure)
    assert_bits(detached(ps), values())
    assert str(before) == str(optimizer.state_dict())
