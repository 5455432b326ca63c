"""Results compared with an independent float64 optimizer, with torch, and with the paper's equation."""

from __future__ import annotations

import golden
import pytest
import torch
from backends import BACKENDS
from tolerances import MANY_STEPS, ONE_STEP

import nesterov_pp as npp
from nesterov_pp.optim import coefficients, convex_schedule

SHAPES = [(3,), (7, 5), (), (0,), (1, 1), (129, 257), (65_537,)]
NADAM_OPTIONS = [
    {},
    {"lr": 1e-2, "betas": (0.99, 0.95), "eps": 1e-4, "momentum_decay": 0.1},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"weight_decay": 0.1, "maximize": True},
]
ADAMW_OPTIONS = [{}, {"lr": 1e-2, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3}, {"maximize": True}]
CASES = [("NAdam", o) for o in NADAM_OPTIONS] + [("AdamW", o) for o in ADAMW_OPTIONS]
GOLDEN = {"NAdam": golden.nadam, "AdamW": golden.adamw}


def problem(dtype: torch.dtype, steps: int, seed: int = 0) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    grads = [[torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES] for _ in range(steps)]
    return weights, grads


def run(optimizer_class: type, weights, grads, **options) -> list[torch.Tensor]:
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = optimizer_class(parameters, **options)
    for step in grads:
        for p, g in zip(parameters, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("steps", [1, 20])
def test_equals_the_float64_optimizer(name, options, dtype, backend, steps):
    weights, grads = problem(dtype, steps)
    ours = run(getattr(npp, name), weights, grads, backend=backend, **options)
    tolerance = (ONE_STEP if steps == 1 else MANY_STEPS)[dtype]
    for i, w in enumerate(weights):
        expected = GOLDEN[name](w, [g[i] for g in grads], **options)
        torch.testing.assert_close(ours[i].double(), expected, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_equals_torch(name, options, dtype, backend):
    weights, grads = problem(dtype, 20)
    # torch keeps the product of mu in a scalar of the default dtype, whatever the parameters are.
    torch.set_default_dtype(dtype)
    try:
        theirs = run(getattr(torch.optim, name), weights, grads, **options)
        ours = run(getattr(npp, name), weights, grads, backend=backend, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(ours, theirs, **MANY_STEPS[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["NAdam", "AdamW"])
def test_a_thousand_steps_drift_less_than_torch(name, backend):
    options = {"weight_decay": 0.1} | ({"decoupled_weight_decay": True} if name == "NAdam" else {})
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(4096, generator=generator)
    grads = [[torch.randn(4096, generator=generator)] for _ in range(1000)]
    exact = GOLDEN[name](w, [g[0] for g in grads], **options)

    def drift(optimizer_class: type, **more) -> float:
        return float((run(optimizer_class, [w], grads, **options, **more)[0].double() - exact).abs().max())

    assert drift(getattr(npp, name), backend=backend) < drift(getattr(torch.optim, name))


def test_the_gradient_of_the_golden_optimizer_is_told_from_wrong_ones():
    """The tests would notice ignored options: each changes the golden result by far more than any tolerance."""
    weights, grads = problem(torch.float64, 20)
    w, g = weights[0], [step[0] for step in grads]
    plain = golden.nadam(w, g)
    for options in NADAM_OPTIONS[1:]:
        assert (golden.nadam(w, g, **options) - plain).abs().max() > 1e-4
    assert (golden.adamw(w, g, lr=2e-3, weight_decay=0.0) - plain).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("t", "c_grad", "c_momentum"),
    [
        (1, 1.00000, 0.65597),
        (2, 0.66879, 0.56368),
        (10, 0.50464, 0.49611),
        (100, 0.49698, 0.50310),
        (10_000, 0.10671, 0.89331),
        (50_000, 0.01014, 0.98986),
    ],
)
def test_nadam_coefficients_at_beta1_099(t, c_grad, c_momentum):
    product = 1.0
    for step in range(1, t + 1):
        row, product = coefficients.nadam(
            step,
            product,
            lr=1.0,
            beta1=0.99,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            momentum_decay=0.004,
            decoupled=True,
        )
    assert row.c_grad == pytest.approx(c_grad, abs=6e-6)
    assert row.c_momentum == pytest.approx(c_momentum, abs=6e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tau", [0, 1, 3, 7])
@pytest.mark.parametrize("gamma", [0.9, 0.99, convex_schedule])
def test_nag_is_equation_10(gamma, tau, backend):
    """Compare Eq. 10 in its literal form, with d_t = gamma_t (w_t - w_{t-1}), with the look-ahead form, in float64."""
    generator = torch.Generator().manual_seed(1)
    curvature = torch.rand(16, generator=generator, dtype=torch.float64) + 0.1
    lr, steps = 0.05, 200
    gamma_at = gamma if callable(gamma) else lambda t: gamma

    w = previous = torch.randn(16, generator=generator, dtype=torch.float64)
    literal = []
    for t in range(1, steps + 1):
        d = gamma_at(t) * (w - previous)
        literal.append(w + d)
        late = curvature * literal[max(0, t - 1 - tau)]
        previous, w = w, w + d - lr * (1 - gamma_at(t)) * late

    parameter = torch.nn.Parameter(literal[0].clone())
    optimizer = npp.NAG([parameter], lr=lr, momentum=gamma, backend=backend)
    stored = [parameter.detach().clone()]
    for t in range(1, steps):
        parameter.grad = curvature * stored[max(0, t - 1 - tau)]
        optimizer.step()
        stored.append(parameter.detach().clone())
    torch.testing.assert_close(torch.stack(stored), torch.stack(literal), **MANY_STEPS[torch.float64])


@pytest.mark.parametrize("factor", [pytest.param(0.25, marks=pytest.mark.slow), 0.75])
def test_nag_converges_at_the_rate_of_theorem_1(factor):
    """On a 1-D quadratic with gamma_t = (t-2)/t the envelope of f is t^(-3/2 + 2 lr beta (tau - 1)).

    That is 1/t at lr beta (tau - 1) = 1/4, and no decay at 3/4.
    """
    tau, steps = 3, 40_000
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = npp.NAG([parameter], lr=factor / (tau - 1), momentum=convex_schedule, backend="reference")
    history = [1.0]
    for _ in range(steps):
        parameter.grad = torch.tensor([history[max(0, len(history) - 1 - tau)]], dtype=torch.float64)
        optimizer.step()
        history.append(float(parameter.detach()))
    f = torch.tensor(history).square()
    early, late = f[steps // 20 : steps // 10].max(), f[steps // 2 :].max()
    slope = torch.log(late / early) / torch.log(torch.tensor(10.0))
    assert float(slope) == pytest.approx(-1.5 + 2 * factor, abs=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_equals_clip_grad_norm(backend):
    weights, grads = problem(torch.float64, 5)
    theirs = [torch.nn.Parameter(w.clone()) for w in weights]
    ours = [torch.nn.Parameter(w.clone()) for w in weights]
    reference = npp.NAdam(theirs, backend=backend)
    clipped = npp.NAdam(ours, max_grad_norm=1.5, backend=backend)
    for step in grads:
        for p, q, g in zip(theirs, ours, step, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.5)
        reference.step()
        clipped.step()
        torch.testing.assert_close(clipped.last_grad_norm, norm)
        assert torch.equal(ours[1].grad, step[1]), "the gradients themselves are left as they were"
    torch.testing.assert_close(ours, theirs, **MANY_STEPS[torch.float64])


@pytest.mark.parametrize("backend", BACKENDS)
def test_microbatches_are_averaged(backend):
    weights, grads = problem(torch.float64, 4)
    mean = [[sum(step[i] for step in grads) / 4 for i in range(len(weights))]]
    total = [[sum(step[i] for step in grads) for i in range(len(weights))]]
    expected = run(npp.AdamW, weights, mean, backend=backend)
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    for p, g in zip(parameters, total[0], strict=True):
        p.grad = g
    npp.AdamW(parameters, backend=backend).step(microbatches=4)
    torch.testing.assert_close([p.detach() for p in parameters], expected, **ONE_STEP[torch.float64])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_is_exact_and_the_same_for_any_number_of_threads(backend):
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (0, 1, 17, 4096, 65_537, 300_001)]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    exact = torch.cat([p.grad.double() for p in parameters]).norm()
    optimizer = npp.NAdam(parameters, max_grad_norm=1e9, backend=backend)
    norms = set()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            optimizer.step()
            norms.add(float(optimizer.last_grad_norm))
    finally:
        torch.set_num_threads(before)
    for norm in norms:
        assert norm == pytest.approx(float(exact), rel=MANY_STEPS[torch.float32]["rtol"])
    if backend == "cpu":
        assert len(norms) == 1
