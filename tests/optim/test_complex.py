"""Complex parameters, compared with torch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from backends import BACKENDS
from parity import (
    CASES,
    OURS,
    SHARED,
    TORCH,
    assert_same_as_torch,
    detached,
    give,
    values,
)
from tolerances import MANY_STEPS

import nesterov_pp as npp


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_complex_parameters_with_every_option(name, options, dtype, backend):
    """Complex parameters next to real ones, without dimensions or elements, and with transposed gradients."""

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
