"""Scaled and non-finite gradients."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from backends import BACKENDS
from parity import ALL, OURS, SHARED, TORCH, assert_bits
from tolerances import MANY_STEPS, ONE_STEP

import nesterov_pp as npp


def regression() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)), torch.randn(32, 8)


class Scaled(NamedTuple):
    """The observable results of a run with a ``GradScaler``."""

    weights: list[torch.Tensor]
    in_hooks: list[torch.Tensor]
    afterwards: list[torch.Tensor]
    called: list[int]
    scaler: dict[str, Any]
    counts: set[float]


def scaled_run(make: Callable[..., torch.optim.Optimizer], *, unscale: bool) -> Scaled:
    """Run with a scale that is not a power of two; step 5 of 12 overflows."""
    model, x = regression()
    optimizer = make(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=4)
    in_hooks, afterwards, called = [], [], []
    t = 0

    def hook(*_: Any) -> None:
        called.append(t)
        in_hooks.append(model[0].weight.grad.clone())

    optimizer.register_step_pre_hook(hook)
    for t in range(12):
        optimizer.zero_grad()
        loss = model(x).square().mean() * (float("inf") if t == 5 else 1.0)
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        afterwards.append(model[0].weight.grad.clone())
        scaler.update()
    counts = {float(s["step"]) for s in optimizer.state.values() if "step" in s}
    weights = [p.detach() for p in model.parameters()]
    return Scaled(weights, in_hooks, afterwards, called, scaler.state_dict(), counts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unscale", [False, True], ids=["by the step", "by hand"])
@pytest.mark.parametrize("name", ALL)
def test_grad_scaler(name, unscale, backend):
    """A scaled run equals torch's, including the gradients that hooks and later readers see; overflows are skipped."""
    ours = scaled_run(lambda ps, **o: OURS[name](ps, backend=backend, **o), unscale=unscale)
    theirs = scaled_run(TORCH[name], unscale=unscale)
    assert (ours.called, ours.scaler) == (theirs.called, theirs.scaler)
    assert ours.counts == {11}
    torch.testing.assert_close(ours[:3], theirs[:3], equal_nan=True, **MANY_STEPS[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unscale", [False, True], ids=["by the step", "by hand"])
@pytest.mark.parametrize("name", ALL)
def test_fused_unscales_in_the_pass(name, unscale, backend):
    """The run equals torch's; the gradients stay scaled, and hooks are called even for a step that changes nothing."""
    ours = scaled_run(lambda ps, **o: OURS[name](ps, backend=backend, fused=True, **o), unscale=unscale)
    theirs = scaled_run(TORCH[name], unscale=unscale)
    assert ours.scaler == theirs.scaler
    assert (ours.called, ours.counts) == (list(range(12)), {11})
    torch.testing.assert_close(ours.weights, theirs.weights, **MANY_STEPS[torch.float32])
    scale = 1.0 if unscale else 1000.0
    torch.testing.assert_close(ours.in_hooks[0] / scale, theirs.in_hooks[0], **ONE_STEP[torch.float32])
    assert torch.equal(ours.in_hooks[0], ours.afterwards[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fused", [None, True])
def test_a_skipped_step_changes_nothing(fused, backend):
    model, x = regression()
    optimizer = npp.NAdam(model.parameters(), backend=backend, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(x).sum() * float("nan")).backward()
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for state in optimizer.state.values():
        assert float(state["step"]) == 0
        assert float(state["mu_product"]) == 1
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fused", [None, True])
def test_mean_and_limit_are_of_unscaled_gradients(fused, backend):
    results = []
    for cls, extra in (
        (torch.optim.NAdam, {}),
        (npp.NAdam, {"max_grad_norm": 0.1, "fused": fused, "backend": backend}),
    ):
        model, x = regression()
        optimizer = cls(model.parameters(), lr=1e-2, **extra)
        scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
        for _ in range(3):
            optimizer.zero_grad()
            for part in x.chunk(4):
                scaler.scale(model(part).square().mean() / (1.0 if extra else 4.0)).backward()
            if not extra:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer, **({"microbatches": 4} if extra else {}))
            scaler.update()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(results[1], results[0], **MANY_STEPS[torch.float32])


@pytest.mark.parametrize("fused", [None, True])
def test_one_scaler_of_two_optimizers(fused):
    """One optimizer overflows and is skipped, the other is stepped, and the scale falls."""
    results = []
    for make in (torch.optim.NAdam, lambda ps, **o: npp.NAdam(ps, fused=fused, **o)):
        model, x = regression()
        both = [make(layer.parameters(), lr=1e-2) for layer in (model[0], model[2])]
        scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
        for t in range(3):
            for optimizer in both:
                optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            if t == 1:
                model[2].weight.grad[0, 0] = float("inf")
            for optimizer in both:
                scaler.step(optimizer)
            scaler.update()
        results.append([*(p.detach() for p in model.parameters()), torch.tensor(scaler.get_scale())])
    torch.testing.assert_close(results[1], results[0], **MANY_STEPS[torch.float32])
    assert results[1][-1] == 500.0


def stepped_twice(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    scaler.step(optimizer)
    scaler.step(optimizer)


def unscaled_twice(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    scaler.unscale_(optimizer)
    scaler.unscale_(optimizer)


def unscaled_late(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    scaler.step(optimizer)
    scaler.unscale_(optimizer)


def closure_given(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    scaler.step(optimizer, closure=lambda: 1.0)


def no_gradients(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    scaler.step(optimizer)


def half_gradients(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.data = p.data.half()
        p.grad = torch.ones_like(p)
    scaler.step(optimizer)


@pytest.mark.parametrize(
    "mistake", [stepped_twice, unscaled_twice, unscaled_late, closure_given, no_gradients, half_gradients]
)
@pytest.mark.parametrize("name", SHARED)
def test_mistakes_are_refused_in_torchs_words(name, mistake):
    said = []
    for make in (TORCH[name], OURS[name]):
        model, x = regression()
        optimizer = make(model.parameters())
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(model(x).sum()).backward()
        with pytest.raises(Exception) as error:
            mistake(scaler, optimizer)
        said.append((error.type, str(error.value)))
    assert said[1] == said[0]


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_a_closure_by_position_and_a_scaler_that_is_off(enabled, fused):
    """The closure replaces the gradients that the scaler unscaled before it; torch's optimizer takes the new ones."""

    def run(make: Callable[..., torch.optim.Optimizer], in_the_pass: bool) -> list[torch.Tensor]:
        model, x = regression()
        optimizer = make(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            (scaler.scale(loss) if in_the_pass else loss).backward()
            return loss.detach()

        scaler.scale(model(x).square().mean()).backward()
        losses = [scaler.step(optimizer, closure) for _ in range(1 if enabled else 3)]
        scaler.update()
        return [*(p.detach() for p in model.parameters()), *losses]

    ours = run(lambda ps, **o: npp.NAdam(ps, fused=fused, **o), bool(fused))
    torch.testing.assert_close(ours, run(torch.optim.NAdam, False), **MANY_STEPS[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_without_any_gradient_takes_no_step(backend):
    """Without gradients there is no step, as in torch; the scaler's ``found_inf`` is then 0 instead of a tensor."""
    for make in (lambda ps: torch.optim.AdamW(ps, fused=True), lambda ps: npp.AdamW(ps, fused=True, backend=backend)):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = make([p])
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))
        assert scaler.step(optimizer) is None
        assert torch.equal(p.detach(), torch.ones(3))
        assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()


class Stop(BaseException):
    """An exception that, like an interrupt, is not an ``Exception``."""


def stop(*_: Any) -> None:
    raise Stop


class FailsAfterwards(npp.NAdam):
    """A subclass whose own part of ``step`` may fail."""

    fails = False

    def step(self, closure=None, **options):
        loss = super().step(closure, **options)
        if self.fails:
            stop()
        return loss


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize(
    ("cls", "where"),
    [
        *itertools.product(
            [npp.NAdam, npp.AdamW, npp.NAG, FailsAfterwards], ["pre-hook", "closure", "step", "post-hook"]
        ),
        (FailsAfterwards, "subclass"),
    ],
)
def test_a_step_that_fails_leaves_no_scale_behind(cls, where, fused):
    model, x = regression()
    optimizer = cls(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
    scaler.scale(model(x).square().mean()).backward()
    handles = []
    if where == "pre-hook":
        handles.append(optimizer.register_step_pre_hook(stop))
    elif where == "post-hook":
        handles.append(optimizer.register_step_post_hook(stop))
    elif where == "step":
        optimizer.param_groups[0]["lr"] = float("nan")
    elif where == "subclass":
        optimizer.fails = True
    with pytest.raises(ValueError if where == "step" else Stop):
        scaler.step(optimizer, stop if where == "closure" else None)
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
    for handle in handles:
        handle.remove()
    optimizer.param_groups[0]["lr"], optimizer.fails = 1e-2, False
    copied = copy.deepcopy(optimizer)
    for one in (optimizer, copied):
        for p in one.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        one.step()
    assert_bits(optimizer.param_groups[0]["params"], copied.param_groups[0]["params"])


@pytest.mark.parametrize("base_first", [False, True])
def test_hooks_run_as_often_as_in_torch_where_a_subclass_steps_through_its_base(base_first):
    counts = []
    for cls in (torch.optim.NAdam, npp.NAdam):

        class Base(cls):
            def step(self, closure=None):
                return super().step(closure)

        class Derived(Base):
            def step(self, closure=None):
                return super().step(closure)

        def made(kind, called: list[int]) -> torch.optim.Optimizer:
            optimizer = kind([torch.nn.Parameter(torch.ones(2))])
            optimizer.register_step_pre_hook(lambda *_: called.append(1))
            return optimizer

        called: list[list[int]] = [[], []]
        kinds = [Base, Derived] if base_first else [Derived, Base]
        for optimizer in [made(kind, each) for kind, each in zip(kinds, called, strict=True)]:
            optimizer.step()
            optimizer.step()
        counts.append([len(each) for each in called])
    assert counts[1] == counts[0]


@pytest.mark.parametrize("fused", [None, False, True])
@pytest.mark.parametrize("name", ALL)
def test_who_unscales_is_kept_beside_the_groups(name, fused):
    """The constructor chooses who unscales, as in torch; the choice is saved only where torch saves it."""
    theirs = TORCH[name](regression()[0].parameters(), **({"fused": fused} if name == "AdamW" else {}))
    optimizer = OURS[name](regression()[0].parameters(), fused=fused)

    def unscales(one: torch.optim.Optimizer) -> bool:
        return getattr(one, "_step_supports_amp_scaling", False)

    assert unscales(optimizer) == bool(fused)
    if name == "AdamW":
        assert unscales(optimizer) == unscales(theirs)
    if name in SHARED:
        assert optimizer.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    assert ("fused" in optimizer.param_groups[0]) == (name == "AdamW")
    optimizer.load_state_dict(OURS[name](regression()[0].parameters(), fused=not fused).state_dict())
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "fused": not fused})
    for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert unscales(one) == bool(fused)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_named(value, backend):
    model, x = regression()
    optimizer = npp.NAdam(model.named_parameters(), on_nonfinite="raise", backend=backend)
    model(x).sum().backward()
    optimizer.step()
    model[2].weight.grad[0, 3] = value
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match=r"the gradient of 2\.weight is not finite; nothing has been updated"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert float(optimizer.state[model[0].weight]["step"]) == 1
    model[2].weight.grad[0, 3] = 0.0
    optimizer.step()
    assert float(optimizer.state[model[0].weight]["step"]) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_not_finite_go_through_as_in_torch(backend):
    results = []
    for cls, extra in ((torch.optim.NAdam, {}), (npp.NAdam, {"backend": backend})):
        p = torch.nn.Parameter(torch.ones(4))
        p.grad = torch.tensor([1.0, float("nan"), float("inf"), -2.0])
        cls([p], **extra).step()
        results.append(p.detach())
    torch.testing.assert_close(results[1], results[0], equal_nan=True, **MANY_STEPS[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_clipping_by_a_norm_that_is_not_finite_is_torchs(value, backend):
    results = []
    for folded in (False, True):
        ps = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
        ps[0].grad, ps[1].grad = torch.tensor([1.0, value, 2.0]), torch.ones(2)
        if folded:
            npp.NAdam(ps, max_grad_norm=1.0, backend=backend).step()
        else:
            torch.nn.utils.clip_grad_norm_(ps, 1.0)
            npp.NAdam(ps, backend=backend).step()
        results.append([p.detach() for p in ps])
    torch.testing.assert_close(*results, equal_nan=True)


def test_large_finite_gradients_do_not_count_as_not_finite():
    """The squares overflow float32, and so does the norm, but no gradient must be reported."""
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.full((4,), 1e30)
    optimizer = npp.NAdam([p], on_nonfinite="raise")
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 1
    assert p.isfinite().all()


def test_a_bad_choice_is_refused():
    with pytest.raises(ValueError, match="Invalid on_nonfinite: 'skip'; choose one of ignore, raise"):
        npp.NAdam([torch.nn.Parameter(torch.ones(2))], on_nonfinite="skip")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_beyond_the_gradients_dtype_clips(dtype, backend):
    """Every gradient is finite in float16, but their norm is not."""
    p = torch.nn.Parameter(torch.zeros(5000, dtype=dtype))
    p.grad = (torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 2000).to(dtype)
    optimizer = npp.NAdam([p], max_grad_norm=1.0, on_nonfinite="raise", backend=backend)
    optimizer.step()
    assert float(optimizer.last_grad_norm) == pytest.approx(float(p.grad.double().norm()), rel=1e-5)
    assert (p.detach() != 0).float().mean() > 0.9
