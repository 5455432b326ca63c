"""More of what users of torch.optim do; NAG is held against torch's SGD, of which it is a rescaling."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import BACKENDS
from tolerances import MANY_STEPS

import nesterov_pp as npp

SHARED = ["NAdam", "AdamW"]
ALL = ["NAdam", "AdamW", "NAG"]
SHAPES = [(4, 3), (5,), (2, 2, 2)]
GAMMA = 0.9
# NAG keeps m = (1 - gamma) times the buffer of torch's SGD(nesterov=True), whose rate is then (1 - gamma) times ours.
TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "NAdam": torch.optim.NAdam,
    "AdamW": torch.optim.AdamW,
    "NAG": lambda ps, lr=1e-3, **options: torch.optim.SGD(
        ps, lr=lr * (1 - GAMMA), momentum=GAMMA, nesterov=True, **options
    ),
}
OURS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "NAdam": npp.NAdam,
    "AdamW": npp.AdamW,
    "NAG": lambda ps, **options: npp.NAG(ps, momentum=GAMMA, **options),
}


def values(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(v) for v in values(dtype, seed)]


def give(ps, t: int) -> None:
    generator = torch.Generator().manual_seed(1000 + t)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def detached(ps) -> list[torch.Tensor]:
    return [p.detach() for p in ps]


def assert_same_as_torch(name: str, scenario: Callable[[Callable[..., Any]], Any], **ours: Any) -> None:
    """``scenario(make)`` builds an optimizer with ``make``, uses it, and returns tensors."""
    mine, theirs = scenario(lambda ps, **o: OURS[name](ps, **o, **ours)), scenario(TORCH[name])
    dtype = torch.promote_types(torch.float32, torch.tensor(0.0).dtype)
    torch.testing.assert_close(mine, theirs, check_stride=False, **MANY_STEPS[dtype])


def assert_bits(ps, qs) -> None:
    for p, q in zip(ps, qs, strict=True):
        assert torch.equal(p, q), f"{p} and {q}"


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
    assert type(ours.state) is type(theirs.state)


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


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("name", ALL)
def test_a_parameter_twice_in_a_group_is_refused(name):
    p, q, *_ = parameters()
    with pytest.raises(ValueError, match="a parameter group has the same parameter twice; a step would count it once"):
        OURS[name]([p, q, p])


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
    """One tensor for all groups, as in torch; it goes through a checkpoint and is no longer shared then."""

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
    """Added, with a bare tensor too; appended to; taken out; reordered."""

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
    """A step hook may replace the arguments, a save hook the result, a load hook the state that is read."""

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
    """As users are told to do for checkpoints of a model that has changed since."""
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


# ---------------------------------------------------------------------- copies


class Counting(npp.NAdam):
    """A subclass with attributes of its own, as users write them."""

    def __init__(self, params, factor: float, **options: Any) -> None:
        super().__init__(params, **options)
        self.factor = factor
        self.count = 0

    def step(self, closure=None, **options):
        self.count += 1
        return super().step(closure, **options)

    def __getstate__(self):
        return {**super().__getstate__(), "factor": self.factor, "count": self.count}


def through_torch_save(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda o: pickle.loads(pickle.dumps(o)), "save": through_torch_save}


@pytest.mark.parametrize("way", COPIES)
def test_a_subclass_keeps_its_attributes_through_copies(way):
    ps = parameters()
    optimizer = Counting(ps, 0.5, lr=0.02, max_grad_norm=1.0)
    give(ps, 0)
    optimizer.step()
    copied = COPIES[way](optimizer)
    assert (type(copied), copied.factor, copied.count) == (Counting, 0.5, 1)
    qs = copied.param_groups[0]["params"]
    give(ps, 1)
    give(qs, 1)
    optimizer.step()
    copied.step()
    assert (optimizer.count, copied.count) == (2, 2)
    assert_bits(ps, qs)


def falling(t: int) -> float:
    return 0.9 / t


@pytest.mark.parametrize("way", COPIES)
def test_nag_keeps_its_schedule_through_copies(way):
    ps = parameters()
    optimizer = npp.NAG(ps, lr=0.1, momentum=falling)
    for t in range(3):
        give(ps, t)
        optimizer.step()
    copied = COPIES[way](optimizer)
    qs = copied.param_groups[0]["params"]
    for t in range(3, 6):
        give(ps, t)
        give(qs, t)
        optimizer.step()
        copied.step()
    assert_bits(ps, qs)
    assert copied.param_groups[0]["momentum"] == falling(6)


@pytest.mark.parametrize("name", ALL)
def test_a_model_and_its_optimizer_copied_together_belong_together(name):
    model = torch.nn.Linear(3, 2)
    optimizer = OURS[name](model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    both = copy.deepcopy([model, optimizer])
    for net, o in ([model, optimizer], both):
        o.zero_grad()
        net(torch.ones(1, 3)).square().sum().backward()
        o.step()
    assert both[1].param_groups[0]["params"][0] is both[0].weight
    assert both[0].weight is not model.weight
    assert_bits(model.parameters(), both[0].parameters())


@pytest.mark.parametrize("name", ALL)
def test_extra_keys_of_groups_are_kept(name):
    optimizer = OURS[name]([{"params": parameters(), "initial_lr": 0.5, "tag": "mine"}])
    again = OURS[name](parameters())
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["tag"] == "mine"
    assert again.param_groups[0]["initial_lr"] == 0.5


# ---------------------------------------------------------------------- layouts


BASE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5))
LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "channels last": lambda t: t.clone(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "strided": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    "offset": lambda t: torch.cat([t.new_ones(1, 3, 4, 4), t])[1:],
}
GRADIENTS = {**LAYOUTS, "expanded": lambda t: t[:1, :, :1, :1].expand(t.shape)}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("grad", GRADIENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_beside_every_other(layout, grad, name):
    def scenario(make):
        p = torch.nn.Parameter(LAYOUTS[layout](BASE))
        optimizer = make([p], lr=0.01)
        strides = p.stride()
        for t in range(3):
            g = torch.randn(BASE.shape, generator=torch.Generator().manual_seed(t))
            p.grad = GRADIENTS[grad](g)
            optimizer.step()
            torch.testing.assert_close(p.grad, GRADIENTS[grad](g), rtol=0, atol=0)  # read, not written
        assert p.stride() == strides
        return [p.detach()]

    assert_same_as_torch(name, scenario)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("others", [0, 2])
def test_expanded_parameters_are_refused_by_name(name, named, others):
    p = torch.nn.Parameter(torch.ones(3, 1).expand(3, 4))
    ps = [*parameters()[:others], p]
    optimizer = OURS[name]([(f"layer.{i}", q) for i, q in enumerate(ps)] if named else ps)
    give(ps, 0)
    before, state = [q.detach().clone() for q in ps], copy.deepcopy(optimizer.state_dict()["state"])
    label = f"layer.{others}" if named else f"parameter {others}"
    with pytest.raises(ValueError, match=label):
        optimizer.step()
    assert_bits(detached(ps), before)
    assert str(state) == str(optimizer.state_dict()["state"])


@pytest.mark.parametrize("name", ALL)
def test_parameters_that_overlap_themselves_without_being_expanded(name):
    """Rows one element apart: torch's own result, or a refusal that changes nothing."""

    def build():
        base = torch.linspace(-1.0, 1.0, 5)
        p = torch.nn.Parameter(base.as_strided((3, 3), (1, 1)))
        p.grad = torch.arange(9.0).view(3, 3)
        return base, p

    base, p = build()
    optimizer = OURS[name]([p])
    refusal = ""
    try:
        optimizer.step()
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert "parameter 0" in refusal
        assert torch.equal(base, torch.linspace(-1.0, 1.0, 5))
        assert float(optimizer.state[p]["step"]) == 0
    else:
        expected, q = build()
        TORCH[name]([q]).step()
        torch.testing.assert_close(base, expected, **MANY_STEPS[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("to", ["memory of its own", "a view", "channels last", "a gap"])
def test_data_reassigned_between_steps(name, to, backend):
    if backend != "reference" and to == "a gap":
        pytest.skip("the kernels say that they take dense tensors only")

    def scenario(make):
        p = torch.nn.Parameter(BASE.clone())
        optimizer = make([p], lr=0.01)
        storage = torch.zeros(4, *BASE.shape)
        for t in range(6):
            if t == 3:
                new = {
                    "memory of its own": lambda v: v + 1,
                    "a view": lambda v: storage[2].copy_(v),
                    "channels last": lambda v: v.contiguous(memory_format=torch.channels_last),
                    "a gap": lambda v: v.repeat_interleave(2, dim=3)[..., ::2],
                }[to]
                p.data = new(p.data)
            give([p], t)
            optimizer.step()
        return [p.detach(), *([storage] if to == "a view" else [])]

    assert_same_as_torch(name, scenario, backend=backend)


@pytest.mark.parametrize("name", ALL)
def test_only_empty_parameters(name):
    ps = [torch.nn.Parameter(torch.empty(0)), torch.nn.Parameter(torch.empty(3, 0))]
    optimizer = OURS[name](ps, max_grad_norm=1.0, on_nonfinite="raise")
    for t in range(2):
        give(ps, t)
        optimizer.step()
    assert float(optimizer.last_grad_norm) == 0.0
    assert float(optimizer.state[ps[1]]["step"]) == 2


@pytest.mark.parametrize("name", ALL)
def test_a_step_without_any_gradient_changes_nothing(name):
    ps = parameters()
    optimizer = OURS[name](ps, max_grad_norm=1.0)
    optimizer.step()
    assert_bits(detached(ps), values())
    assert all(float(s["step"]) == 0 for s in optimizer.state.values())


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
        # Ours is kept in double there, torch's in the default dtype.
        assert ours.pop("mu_product")[0] == torch.float64
        theirs.pop("mu_product")
    assert ours == theirs


@pytest.mark.parametrize("name", SHARED)
def test_a_parameter_that_never_had_a_gradient_goes_through_checkpoints_both_ways(name):
    """torch has no state for it, ours an untouched one: both mean the same to the other."""

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


# ---------------------------------------------------------------------- complex


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "NAdam": [
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"maximize": True, "lr": 0.05},
        {"betas": (0.99, 0.9), "momentum_decay": 0.1},
    ],
    "AdamW": [{"weight_decay": 0.3}, {"maximize": True, "lr": 0.05}, {"betas": (0.5, 0.7), "eps": 1e-2}],
    "NAG": [{}, {"maximize": True}],
}
COMPLEX_CASES = [(name, options) for name, cases in OPTIONS.items() for options in cases]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize(("name", "options"), COMPLEX_CASES, ids=str)
def test_complex_parameters_with_every_option(name, options, dtype, backend):
    """Beside real ones, of no dimension and of none elements, and with transposed gradients."""

    def scenario(make):
        generator = torch.Generator().manual_seed(0)
        shapes = [(4, 3), (), (0,), (1,), (7,)]
        ps = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]
        ps.append(torch.nn.Parameter(torch.randn(5, generator=generator, dtype=dtype.to_real())))
        optimizer = make(ps, **options)
        for t in range(6):
            give(ps, t)
            ps[0].grad = ps[0].grad.t().contiguous().t()
            if t == 2:
                ps[4].grad = None
            optimizer.step()
        kept = () if name == "NAG" else ("exp_avg", "exp_avg_sq")
        return [*detached(ps), *(optimizer.state[p][key] for p in ps for key in kept)]

    if dtype == torch.complex128:
        torch.set_default_dtype(torch.float64)
    try:
        assert_same_as_torch(name, scenario, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHARED)
def test_complex_checkpoints_both_ways(name, backend):
    def scenario(make, others):
        ps, qs = ([torch.nn.Parameter(torch.randn(4, dtype=torch.complex64, generator=g))] for g in generators())
        optimizer, other = make(ps), others(qs)
        for t in range(3):
            for o, vs in ((optimizer, ps), (other, qs)):
                give(vs, t)
                o.step()
        optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
        for t in range(3, 6):
            give(ps, t)
            optimizer.step()
        return detached(ps)

    def generators():
        return [torch.Generator().manual_seed(0) for _ in range(2)]

    def ours(ps):
        return OURS[name](ps, backend=backend)

    expected = scenario(TORCH[name], TORCH[name])
    for make, others in ((ours, TORCH[name]), (TORCH[name], ours), (ours, ours)):
        torch.testing.assert_close(scenario(make, others), expected, **MANY_STEPS[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_complex_gradients_are_clipped_as_torch_clips_them(backend):
    def scenario(make):
        ps = [torch.nn.Parameter(v) for v in values(torch.complex64)]
        inside = make is not TORCH["AdamW"]
        optimizer = make(ps, **({"max_grad_norm": 0.5} if inside else {}))
        norms = []
        for t in range(3):
            give(ps, t)
            norm = None if inside else torch.nn.utils.clip_grad_norm_(ps, 0.5)
            optimizer.step()
            norms.append(float(optimizer.last_grad_norm if norm is None else norm))
        return [*detached(ps), torch.tensor(norms)]

    assert_same_as_torch("AdamW", scenario, backend=backend)


def test_a_complex_gradient_that_is_not_finite_is_named():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = npp.NAdam([("z", p)], on_nonfinite="raise")
    p.grad = torch.tensor([1.0, complex(0.0, math.nan), 2.0])
    with pytest.raises(FloatingPointError, match="the gradient of z is not finite"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3, dtype=torch.complex64))


# ---------------------------------------------------------------------- what torch refuses


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


# ---------------------------------------------------------------------- differentiable


def through(make, name: str, inputs: list[torch.Tensor], steps: int, **options: Any) -> list[torch.Tensor]:
    """Parameters and state after some steps, as functions of parameters, gradients and state before, for NAG too."""
    p, g, *moments = inputs
    p = p.clone()
    optimizer = make([p], differentiable=True, **options)
    if name == "NAG":
        # SGD's buffer is m / (1 - gamma), as its rate is (1 - gamma) times ours.
        if isinstance(optimizer, torch.optim.SGD):
            optimizer.state[p]["momentum_buffer"] = moments[0] / (1 - GAMMA)
        else:
            optimizer.state[p] = {"step": torch.tensor(3.0), "exp_avg": moments[0].clone()}
    else:
        optimizer.state[p] = {"step": torch.tensor(3.0, dtype=torch.float64)}
        if name == "NAdam":
            optimizer.state[p]["mu_product"] = torch.tensor(0.3, dtype=torch.float64)
        optimizer.state[p] |= {k: m.clone() for k, m in zip(("exp_avg", "exp_avg_sq"), moments, strict=True)}
    for t in range(steps):
        p.grad = g * (t + 1)
        optimizer.step()
    return [p]


def differentiable_inputs(name: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand(4, generator=generator, dtype=torch.float64) + 0.5 for _ in range(3 if name == "NAG" else 4)]
    return [t.requires_grad_() for t in inputs]


@pytest.mark.filterwarnings("ignore:differentiable=True takes the slower reference backend:RuntimeWarning")
@pytest.mark.parametrize(("name", "options"), COMPLEX_CASES, ids=str)
def test_gradients_flow_through_steps_to_parameters_gradients_and_state(name, options):
    """torch.float64 throughout, so that torch's product of mu is no less exact than ours."""
    torch.set_default_dtype(torch.float64)
    try:
        jacobians = []
        for make in (OURS[name], TORCH[name]):
            inputs = differentiable_inputs(name)
            (p,) = through(make, name, inputs, 3, **options)
            jacobians.append([p.detach(), *torch.autograd.grad((p**2).sum(), inputs)])
        assert all(g.abs().min() > 0 for g in jacobians[0][1:])
        torch.testing.assert_close(*jacobians, rtol=1e-10, atol=1e-12)
        assert torch.autograd.gradcheck(
            lambda *xs: through(OURS[name], name, list(xs), 2, **options)[0], differentiable_inputs(name)
        )
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ALL)
def test_a_differentiable_optimizer_on_leaves_steps_as_a_plain_one(name):
    """The warning is said once, at construction; a leaf that needs gradients is refused by autograd as in torch."""
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.warns(RuntimeWarning, match="^differentiable=True takes the slower reference backend$") as said:
        optimizer = OURS[name]([p], differentiable=True)
    assert len(said) == 1
    assert said[0].filename == __file__
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place operation"):
        optimizer.step()
    q = torch.ones(3)
    with pytest.warns(RuntimeWarning) as said:
        optimizer = OURS[name]([q], differentiable=True)
    q.grad = torch.ones(3)
    optimizer.step()
    optimizer.step()
    assert len(said) == 1
    plain = torch.nn.Parameter(torch.ones(3))
    other = OURS[name]([plain])
    for _ in range(2):
        plain.grad = torch.ones(3)
        other.step()
    torch.testing.assert_close(q, plain.detach(), **MANY_STEPS[torch.float32])


@pytest.mark.filterwarnings("ignore:differentiable=True takes the slower reference backend:RuntimeWarning")
@pytest.mark.parametrize("name", ["NAdam", "AdamW"])
def test_a_rate_that_needs_a_gradient_gets_torchs_or_is_refused(name):
    """Learning the rate: a gradient that is None without a word would be the worst answer."""

    def slope(make):
        rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        start = torch.linspace(0.5, 1.5, 4, dtype=torch.float64).requires_grad_()
        p = start.clone()
        p.grad = torch.linspace(1.0, 2.0, 4, dtype=torch.float64)
        make([p], lr=rate, differentiable=True).step()
        return torch.autograd.grad((p**2).sum(), rate, allow_unused=True)[0]

    expected = slope(TORCH[name])
    refusal, found = "", None
    try:
        found = slope(OURS[name])
    except (ValueError, RuntimeError) as error:
        refusal = str(error)
    if refusal:
        assert "lr" in refusal
    else:
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------- amsgrad


AMSGRAD = "^amsgrad=True takes the slower reference backend$"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"weight_decay": 0.5, "betas": (0.8, 0.5)}], ids=str)
def test_amsgrad_with_options(options, dtype):
    def scenario(make):
        ps = parameters(dtype)
        optimizer = make(ps, amsgrad=True, **options)
        for t in range(8):
            give(ps, t)
            for p in ps:
                p.grad.mul_(4.0 if t < 2 else 0.1)
            optimizer.step()
        return [*detached(ps), *(optimizer.state[p]["max_exp_avg_sq"] for p in ps)]

    with pytest.warns(RuntimeWarning, match=AMSGRAD) as said:
        assert_same_as_torch("AdamW", scenario)
    assert len(said) == 1


def test_amsgrad_checkpoints_both_ways():
    def scenario(make, others):
        ps, qs = parameters(), parameters()
        optimizer, other = make(ps, amsgrad=True), others(qs, amsgrad=True)
        for t in range(3):
            give(qs, t)
            other.step()
        optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
        for t in range(3, 6):
            give(ps, t)
            optimizer.step()
        return detached(ps)

    with pytest.warns(RuntimeWarning, match=AMSGRAD):
        results = [scenario(a, b) for a in (TORCH["AdamW"], OURS["AdamW"]) for b in (TORCH["AdamW"], OURS["AdamW"])]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], **MANY_STEPS[torch.float32])


@pytest.mark.filterwarnings("ignore:amsgrad=True takes the slower reference backend:RuntimeWarning")
@pytest.mark.parametrize("how", ["one group", "switched off"])
def test_amsgrad_in_one_group_and_switched_off(how):
    def scenario(make):
        ps = parameters()
        optimizer = make([{"params": ps[:1], "amsgrad": True}, {"params": ps[1:]}])
        for t in range(6):
            if t == 3 and how == "switched off":
                optimizer.param_groups[0]["amsgrad"] = False
            give(ps, t)
            for p in ps:
                p.grad.mul_(6 - t)
            optimizer.step()
        return detached(ps)

    assert_same_as_torch("AdamW", scenario)


@pytest.mark.parametrize("way", ["a group given at the start", "a group added later"])
def test_amsgrad_of_a_group_is_warned_of_too(way):
    def train(ps):
        if way == "a group given at the start":
            optimizer = npp.AdamW([{"params": ps[:1], "amsgrad": True}, {"params": ps[1:]}])
        else:
            optimizer = npp.AdamW(ps[:1])
            optimizer.add_param_group({"params": ps[1:], "amsgrad": True})
        for t in range(3):
            give(ps, t)
            optimizer.step()

    with pytest.warns(RuntimeWarning, match=AMSGRAD) as said:
        train(parameters())
    assert len(said) == 1
    assert said[0].filename == __file__
