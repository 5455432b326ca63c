"""Options that only the reference backend supports: differentiable=True and amsgrad=True."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from parity import (
    ALL,
    CASES,
    GAMMA,
    OURS,
    TORCH,
    assert_same_as_torch,
    detached,
    give,
    parameters,
)
from tolerances import MANY_STEPS

import nesterov_pp as npp

# ---------------------------------------------------------------------- differentiable


def through(make, name: str, inputs: list[torch.Tensor], steps: int, **options: Any) -> list[torch.Tensor]:
    """Return the parameter after some steps, as a function of the parameter, gradient and moments before."""
    p, g, *moments = inputs
    p = p.clone()
    optimizer = make([p], differentiable=True, **options)
    if name == "NAG":
        # SGD's buffer is m / (1 - gamma), since its rate is (1 - gamma) times ours.
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


@pytest.mark.filterwarnings("ignore:differentiable=True uses the slower reference backend:RuntimeWarning")
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_gradients_flow_through_steps_to_parameters_gradients_and_state(name, options):
    """Use torch.float64 throughout, so that torch's product of mu is as exact as ours."""
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
    """The constructor warns once; autograd refuses a leaf that requires gradients, as in torch."""
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.warns(RuntimeWarning, match="^differentiable=True uses the slower reference backend$") as said:
        optimizer = getattr(npp, name)([p], differentiable=True)
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


@pytest.mark.filterwarnings("ignore:differentiable=True uses the slower reference backend:RuntimeWarning")
@pytest.mark.parametrize("name", ["NAdam", "AdamW"])
def test_a_rate_that_needs_a_gradient_gets_torchs_or_is_refused(name):
    """When learning the rate, a gradient that is silently None would be the worst answer."""

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


AMSGRAD = "^amsgrad=True uses the slower reference backend$"


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


@pytest.mark.filterwarnings("ignore:amsgrad=True uses the slower reference backend:RuntimeWarning")
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


@pytest.mark.filterwarnings("ignore:differentiable=True uses the slower")
def test_gradients_reach_all_of_the_state():
    """This includes the product of the momenta and the largest second moment."""

    def through(module, name: str, **options) -> tuple[torch.Tensor, ...]:
        start = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
        product = torch.tensor(0.5, dtype=torch.float64).requires_grad_()
        second = torch.linspace(0.5, 2, 5, dtype=torch.float64).requires_grad_()
        p = start.clone()
        optimizer = getattr(module, name)([p], lr=0.1, differentiable=True, **options)
        p.grad = 2 * start
        optimizer.state[p].update(
            step=torch.tensor(3.0), exp_avg=start * 0.1, exp_avg_sq=second.clone(), max_exp_avg_sq=second * 2
        )
        if name == "NAdam":
            optimizer.state[p]["mu_product"] = product.clone()
        optimizer.step()
        inputs = (start, second, product) if name == "NAdam" else (start, second)
        return torch.autograd.grad((p**2).sum(), inputs)

    for name, options in (("NAdam", {}), ("AdamW", {"amsgrad": True}), ("AdamW", {})):
        ours, theirs = through(npp, name, **options), through(torch.optim, name, **options)
        torch.testing.assert_close(ours, theirs)
        assert all(gradient.abs().sum() > 0 for gradient in ours)
