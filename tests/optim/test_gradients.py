"""Gradients that are scaled or not finite."""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS
from tolerances import MANY_STEPS

import nesterov_pp as npp


def regression() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)), torch.randn(32, 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unscale", [False, True], ids=["folded", "unscaled by hand"])
@pytest.mark.parametrize("name", ["NAdam", "AdamW"])
def test_grad_scaler(name, unscale, backend):
    """A scaled run equals torch's; the scale is no power of two, and one step overflows."""
    results = []
    for cls, extra in ((getattr(torch.optim, name), {}), (getattr(npp, name), {"backend": backend})):
        model, x = regression()
        optimizer = cls(model.parameters(), lr=1e-2, **extra)
        scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=4)
        for t in range(12):
            optimizer.zero_grad()
            loss = model(x).square().mean() * (float("inf") if t == 5 else 1.0)
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        steps = {float(s["step"]) for s in optimizer.state.values()}
        assert steps == {11}
        results.append((list(model.parameters()), scaler.get_scale()))
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[1][0], results[0][0], **MANY_STEPS[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skipped_step_changes_nothing(backend):
    model, x = regression()
    optimizer = npp.NAdam(model.parameters(), backend=backend)
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
    """Their squares overflow float32, and so does the norm; no gradient is to be blamed."""
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
    """Every gradient is finite in float16, and their norm is not."""
    p = torch.nn.Parameter(torch.zeros(5000, dtype=dtype))
    p.grad = (torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 2000).to(dtype)
    optimizer = npp.NAdam([p], max_grad_norm=1.0, on_nonfinite="raise", backend=backend)
    optimizer.step()
    assert float(optimizer.last_grad_norm) == pytest.approx(float(p.grad.double().norm()), rel=1e-5)
    assert (p.detach() != 0).float().mean() > 0.9
