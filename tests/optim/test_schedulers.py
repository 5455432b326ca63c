"""Every learning-rate scheduler of torch drives our optimizers as it drives torch's."""

from __future__ import annotations

import inspect

import pytest
import torch
from schedulers import MAKERS, STEPS
from tolerances import MANY_STEPS
from torch.optim import lr_scheduler

import nesterov_pp as npp


def test_no_scheduler_is_left_out():
    base = lr_scheduler.LRScheduler
    public = {n: c for n, c in vars(lr_scheduler).items() if inspect.isclass(c) and n in lr_scheduler.__all__}
    assert {n for n, c in public.items() if issubclass(c, base) and c is not base} <= set(MAKERS)


def run(optimizer_class, make, lr=1e-2) -> tuple[torch.Tensor, list[tuple]]:
    p = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 32))
    optimizer = optimizer_class([p], lr=lr)
    scheduler = make(optimizer)
    seen = []
    for t in range(STEPS):
        p.grad = (p.detach() * (t + 1)).cos()
        optimizer.step()
        group = optimizer.param_groups[0]
        seen.append((float(group["lr"]), group.get("betas"), group.get("momentum")))
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    return p.detach(), seen


@pytest.mark.parametrize("scheduler", MAKERS)
@pytest.mark.parametrize("name", ["NAdam", "AdamW"])
def test_as_with_torch(name, scheduler):
    ours, our_values = run(getattr(npp, name), MAKERS[scheduler])
    theirs, their_values = run(getattr(torch.optim, name), MAKERS[scheduler])
    assert our_values == their_values
    assert len({value[0] for value in our_values}) > 1
    torch.testing.assert_close(ours, theirs, **MANY_STEPS[torch.float32])


@pytest.mark.parametrize("scheduler", ["CyclicLR", "OneCycleLR"])
def test_momentum_is_cycled_with_the_rate(scheduler):
    """beta1 of NAdam and AdamW, gamma of NAG."""
    for optimizer_class in (npp.NAdam, npp.AdamW, npp.NAG):
        _, values = run(optimizer_class, MAKERS[scheduler])
        cycled = {value[2] if optimizer_class is npp.NAG else value[1][0] for value in values}
        assert len(cycled) >= 5


def test_nag_takes_the_cycled_momentum():
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = npp.NAG([p], lr=1.0, momentum=0.5)
    p.grad = torch.ones(1)
    optimizer.step()  # m = 0.5, step 0.5 + 0.25
    assert float(p.detach()) == -0.75
    optimizer.param_groups[0]["momentum"] = 0.25
    optimizer.step()  # m = 0.125 + 0.75 = 0.875, step 0.75 + 0.25 * 0.875
    assert float(p.detach()) == -0.75 - 0.75 - 0.25 * 0.875


@pytest.mark.parametrize("name", ["NAdam", "AdamW"])
def test_a_tensor_rate_changed_in_place(name):
    results = []
    for module in (torch.optim, npp):
        p = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 32))
        rate = torch.tensor(1e-2)
        optimizer = getattr(module, name)([p], lr=rate)
        for t in range(6):
            p.grad = (p.detach() * (t + 1)).cos()
            optimizer.step()
            optimizer.param_groups[0]["lr"].mul_(0.5)
        results.append(p.detach())
    torch.testing.assert_close(results[1], results[0], **MANY_STEPS[torch.float32])
