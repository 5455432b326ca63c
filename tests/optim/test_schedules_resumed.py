"""Schedulers beyond test_schedulers.py: NAG's numbers, tensor rates, groups, and resumed runs."""

from __future__ import annotations

import copy

import pytest
import torch
from backends import BACKENDS
from schedulers import MAKERS, STEPS
from tolerances import MANY_STEPS
from torch.optim import lr_scheduler

import nesterov_pp as npp

DTYPE = torch.float64
CYCLING = ["CyclicLR", "OneCycleLR"]


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=DTYPE) for shape in [(4, 3), (5,)]]


def gradients(t: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + t)
    return [torch.randn(w.shape, generator=generator, dtype=DTYPE) for w in weights()]


def drive(optimizer, ps, scheduler, steps=range(STEPS)) -> list[list[tuple]]:
    seen = []
    for t in steps:
        for p, g in zip(ps, gradients(t), strict=True):
            p.grad = g
        optimizer.step()
        seen.append([(float(g["lr"]), g.get("betas"), g.get("momentum")) for g in optimizer.param_groups])
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    return seen


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(w) for w in weights()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheduler", MAKERS)
def test_nag_takes_the_rates_and_momenta_that_sgd_would_get(scheduler, backend):
    """The schedule is that of torch's SGD, and the weights follow from it by the equation written out here."""
    ps, qs = parameters(), parameters()
    optimizer = npp.NAG(ps, lr=1e-2, momentum=0.9, weight_decay=0.1, backend=backend)
    seen = drive(optimizer, ps, MAKERS[scheduler](optimizer))
    sgd = torch.optim.SGD(qs, lr=1e-2, momentum=0.9, nesterov=True)
    assert seen == drive(sgd, qs, MAKERS[scheduler](sgd))
    assert (len({momentum for ((_, _, momentum),) in seen}) > 1) == (scheduler in CYCLING)
    for i, w in enumerate(weights()):
        m = torch.zeros_like(w)
        for t, ((lr, _, gamma),) in enumerate(seen):
            g = gradients(t)[i]
            m = gamma * m + (1 - gamma) * g
            w = w - lr * 0.1 * w - lr * ((1 - gamma) * g + gamma * m)
        torch.testing.assert_close(ps[i].detach(), w, **MANY_STEPS[DTYPE])


@pytest.mark.parametrize("scheduler", MAKERS)
@pytest.mark.parametrize("name", ["NAdam", "AdamW"])
def test_a_tensor_rate_stays_the_same_tensor_and_steps_as_torchs(name, scheduler):
    torch.set_default_dtype(DTYPE)
    try:
        ours, theirs = parameters(), parameters()
        rate, other = torch.tensor(1e-2), torch.tensor(1e-2)
        optimizer, reference = getattr(npp, name)(ours, lr=rate), getattr(torch.optim, name)(theirs, lr=other)
        seen = drive(optimizer, ours, MAKERS[scheduler](optimizer))
        assert seen == drive(reference, theirs, MAKERS[scheduler](reference))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (optimizer.param_groups[0]["lr"] is rate) == (reference.param_groups[0]["lr"] is other)
    torch.testing.assert_close(ours, theirs, **MANY_STEPS[DTYPE])


@pytest.mark.parametrize("scheduler", ["LambdaLR", "OneCycleLR", "CyclicLR", "ReduceLROnPlateau"])
@pytest.mark.parametrize("name", ["NAdam", "AdamW"])
def test_groups_have_rates_of_their_own(name, scheduler):
    torch.set_default_dtype(DTYPE)
    try:
        results = []
        for module in (npp, torch.optim):
            ps = parameters()
            groups = [{"params": ps[:1], "lr": 3e-2, "betas": (0.8, 0.99)}, {"params": ps[1:]}]
            optimizer = getattr(module, name)(groups, lr=1e-2)
            results.append((drive(optimizer, ps, MAKERS[scheduler](optimizer)), [p.detach() for p in ps]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], **MANY_STEPS[DTYPE])


@pytest.mark.parametrize("scheduler", MAKERS)
@pytest.mark.parametrize("name", ["NAdam", "AdamW", "NAG"])
def test_a_run_resumed_in_the_middle_of_a_schedule_is_bit_exact(name, scheduler):
    whole = parameters()
    optimizer = getattr(npp, name)(whole, lr=1e-2)
    schedule = MAKERS[scheduler](optimizer)
    first = drive(optimizer, whole, schedule, range(9))
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in whole]
    other = getattr(npp, name)(resumed, lr=1e-2)
    again = MAKERS[scheduler](other)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(copy.deepcopy(schedule.state_dict()))
    rest = drive(optimizer, whole, schedule, range(9, STEPS))
    assert rest == drive(other, resumed, again, range(9, STEPS))
    assert first != rest
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed, strict=True))
