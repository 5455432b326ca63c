"""bfloat16 and float16 weights and moments: bit-exact conversions, and steps compared with the reference."""

from __future__ import annotations

import pytest
import torch

import nesterov_pp as npp
from nesterov_pp.kernels import Coefficients, extension

C, REASON = extension.load()
pytestmark = pytest.mark.skipif(C is None, reason=str(REASON))

IDENTITY = Coefficients(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0)
"""Writes the weight as it was read."""
TAKE_GRADIENT = Coefficients(1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0)
"""Makes the first moment the gradient: m + 1 (g - m) with m = 0."""
ROW = Coefficients(0.5, 0.1, 0.1, 0.01, 0.02, 0.3, 0.7, 1.5, 1e-8)
LOW = [torch.bfloat16, torch.float16]
MOMENTS = [
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float16, torch.bfloat16),
]


@pytest.fixture(params=C.isas() if C is not None else [])
def isa(request):
    selected = C.isa()
    C.set_isa(request.param)
    yield request.param
    C.set_isa(selected)


def step(w, g, m, v, row, out=None):
    rows = torch.tensor([row], dtype=torch.float64)
    if out is None:
        torch.ops.nesterov_pp.step_([w], [g], [m], [v] if v is not None else [], rows, [0])
    else:
        torch.ops.nesterov_pp.step_into([w], [out], [g], [m], [v] if v is not None else [], rows, [0])


def every_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", LOW)
def test_every_value_is_read_exactly(dtype):
    """Read all 65,536 values, the finite ones into a float32 moment; NaN must stay NaN."""
    values = every_value(dtype)
    finite = values[values.isfinite()]
    m = torch.zeros(len(finite), dtype=torch.float32)
    step(torch.zeros_like(finite), finite, m, None, TAKE_GRADIENT)
    assert torch.equal(m, finite.float())
    w = values.clone()
    step(w, torch.zeros_like(w), torch.zeros(len(w)), None, IDENTITY)
    ordinary = ~values.isnan()
    ordinary &= values.isfinite()
    assert torch.equal(w[ordinary], values[ordinary])
    assert w[values.isnan()].isnan().all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", LOW)
def test_results_are_rounded_to_nearest_even(dtype):
    """Round float32 results between, at and next to the midpoints of neighbours, including denormals and overflow; the
    results must equal torch's own conversion."""
    values = every_value(dtype)
    values = values[values.isfinite()].float()
    largest = torch.finfo(dtype).max
    near = torch.cat([values, values * (1 + 2**-9), values * (1 + 2**-12), values * (1 + 2**-8), values / 3])
    beyond = torch.tensor([largest, -largest]) * torch.tensor([[1.0], [1.0001], [1.0005], [1.002], [1.01], [2.0]])
    wanted = torch.cat([near, beyond.flatten()])
    wanted = wanted[wanted.abs() < 3e38]
    # moment = 0 + 1 (g - 0): the gradient is float32, so the weights are float32 and only the moment is low precision
    if dtype == torch.bfloat16:
        m = torch.zeros(len(wanted), dtype=dtype)
        step(torch.zeros_like(wanted), wanted, m, None, TAKE_GRADIENT)
        got = m
    else:
        # float16: the weight is rounded when it is written; w' = 0 - (0 + 1 m), m in float32
        got = torch.zeros(len(wanted), dtype=dtype)
        m = -wanted.clone()
        row = Coefficients(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
        step(got, torch.zeros_like(got), m, None, row)
    assert torch.equal(got, wanted.to(dtype))


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize(("dtype", "moment"), MOMENTS)
def test_a_step_equals_the_reference(dtype, moment, adaptive, into, isa):
    """Both compute in float32 and round once, so results differ by at most one unit in the last place, and rarely: only
    if the float32 results lie on either side of a midpoint."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return torch.randn(70_001, generator=generator)

    w, g, m, v = draw().to(dtype), draw().to(dtype), draw().to(moment), (draw().abs() + 0.1).to(moment)
    expected, em, ev = torch.empty_like(w), m.clone(), v.clone()
    npp.kernels.reference.update(w, expected, g, em, ev if adaptive else None, ROW)
    got = torch.full_like(w, torch.nan) if into else w
    step(w, g, m, v if adaptive else None, ROW, out=got if into else None)
    for ours, theirs in ((got, expected), (m, em), (v, ev)):
        epsilon = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=2 * epsilon, atol=4 * torch.finfo(torch.float32).eps)
        if ours.dtype in LOW:
            assert (ours != theirs).float().mean() < 1e-3
    assert isa in C.isas()


@pytest.mark.parametrize(("dtype", "moment"), MOMENTS)
def test_every_instruction_set_gives_the_same_bits(dtype, moment):
    results = []
    selected = C.isa()
    try:
        for name in C.isas():
            C.set_isa(name)
            generator = torch.Generator().manual_seed(1)
            w, g, m, v = (torch.randn(10_003, generator=generator) for _ in range(4))
            w, g, m, v = w.to(dtype), g.to(dtype), m.to(moment), v.abs().to(moment)
            step(w, g, m, v, ROW)
            results.append((w, m, v))
    finally:
        C.set_isa(selected)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("name", ["NAdam", "AdamW", "NAG"])
def test_optimizers_in_low_precision(name, dtype, state_dtype):
    """After 20 steps, the error against float64 is at most twice that of torch's optimizer in the same precision."""
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(4096, generator=generator).to(dtype)
    grads = [torch.randn(4096, generator=generator).to(dtype) for _ in range(20)]

    def run(cls, precision, **options) -> torch.Tensor:
        p = torch.nn.Parameter(start.to(precision).clone())
        optimizer = cls([p], lr=1e-2, **options)
        for g in grads:
            p.grad = g.to(precision)
            optimizer.step()
        if options.get("state_dtype") is not None:
            assert optimizer.state[p]["exp_avg"].dtype == options["state_dtype"]
        return p.detach().double()

    exact = run(getattr(npp, name), torch.float64, backend="reference")
    error = (run(getattr(npp, name), dtype, state_dtype=state_dtype, backend="cpu") - exact).abs()
    if name == "NAG":
        peer = (run(npp.NAG, dtype, backend="reference") - exact).abs()
    else:
        peer = (run(getattr(torch.optim, name), dtype) - exact).abs()
    if dtype in LOW or state_dtype is None:
        assert error.mean() <= 2 * peer.mean()
    else:
        assert error.max() < 0.05, "bfloat16 moments beside float32 weights: a share of the 20 steps of 0.01"


def test_the_norm_of_low_precision_gradients():
    for dtype in LOW:
        p = torch.nn.Parameter(torch.zeros(10_001, dtype=dtype))
        p.grad = torch.randn(10_001, generator=torch.Generator().manual_seed(0)).to(dtype)
        optimizer = npp.NAdam([p], max_grad_norm=1.0, backend="cpu")
        optimizer.step()
        assert float(optimizer.last_grad_norm) == pytest.approx(float(p.grad.double().norm()), rel=1e-6)
