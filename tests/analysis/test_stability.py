"""The largest stable step: closed forms, the boundary of the unit circle, and the recurrence itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nesterov_pp as npp
from nesterov_pp.analysis import (
    RULES,
    LinearRule,
    characteristic_polynomial,
    delays,
    fastest_step,
    linear_rule,
    max_stable_step,
    quadratic,
    simulate,
    spectral_radius,
)
from nesterov_pp.optim import coefficients

EXACT = 1e-9
"""The relative tolerance: the rounding of the eigenvalues where no two roots are close to each other."""

# Rule, momentum, horizon as a multiple of the delay (None: the rule's own), edges for delays 1, 2, 5, 7 and 31.
TABLE = [
    ("sgd", 0.9, None, [1.0, 0.618, 0.285, 0.209, 0.0499]),
    ("ema", 0.9, None, [1.0, 0.513, 0.215, 0.158, 0.0418]),
    ("ema", 0.99, None, [1.0, 0.501, 0.202, 0.145, 0.0338]),
    ("nag", 0.9, None, [2.53, 0.807, 0.253, 0.176, 0.0428]),
    ("nag", 0.99, None, [9.14, 0.972, 0.250, 0.168, 0.0349]),
    ("nag-undiscounted", 0.99, None, [0.0914, 0.00972, 0.00250, 0.00168, 0.00035]),
    ("nag", 0.9, 1, [2.53, 1.14, 0.366, 0.243, 0.0497]),
    ("nag", 0.99, 1, [9.14, 4.02, 1.17, 0.726, 0.0822]),
    ("extrapolation", 0.9, 1, [2.70, 1.21, 0.366, 0.232, 0.0342]),
    ("extrapolation", 0.99, 1, [9.51, 4.23, 1.25, 0.779, 0.0867]),
]


@pytest.mark.parametrize(("rule", "momentum", "horizon", "edges"), TABLE)
def test_the_edges_that_were_found_before(rule, momentum, horizon, edges):
    for delay, edge in zip([1, 2, 5, 7, 31], edges, strict=True):
        ahead = None if horizon is None else horizon * delay
        found = max_stable_step(rule, momentum=momentum, delay=delay, horizon=ahead)
        assert found == pytest.approx(edge, rel=5e-3, abs=5e-6)  # three digits


@pytest.mark.parametrize("delay", [*range(13), 31, 60])
def test_sgd_has_a_closed_form(delay):
    assert max_stable_step("sgd", delay=delay) == pytest.approx(2 * math.sin(math.pi / (4 * delay + 2)), rel=EXACT)
    step, radius = fastest_step("sgd", delay=delay)
    assert step == pytest.approx(delay**delay / (delay + 1) ** (delay + 1), rel=1e-6)
    assert radius == pytest.approx(delay / (delay + 1), abs=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_without_a_delay_the_edge_is_where_minus_one_is_a_root(momentum):
    """At delay 0, ``P(-1) = 0`` gives ``2 (1 + gamma)`` for heavy ball; the other edges are derived by hand."""
    assert max_stable_step("heavy-ball", momentum=momentum) == pytest.approx(2 * (1 + momentum), rel=EXACT)
    ema = 2 * (1 + momentum) / (1 - momentum)
    assert max_stable_step("ema", momentum=momentum) == pytest.approx(ema, rel=EXACT)
    nesterov = 2 * (1 + momentum) / (1 + 2 * momentum)
    assert max_stable_step("nag-undiscounted", momentum=momentum) == pytest.approx(nesterov, rel=EXACT)


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1.01e-6, 0.99e-6, 1e-8, 1e-10])
def test_a_momentum_close_to_one_is_no_matter(gap):
    """Without a delay, the edge is derived by hand, as above; with one, the limit holds to first order in the gap."""
    gamma = 1 - gap
    edge = 2 * (1 + gamma) / ((1 - gamma) * (1 + 2 * gamma))
    assert max_stable_step("nag", momentum=gamma) == pytest.approx(edge, rel=1e-6)
    assert max_stable_step("ema", momentum=gamma, delay=7) == pytest.approx(1 / 7, rel=10 * gap + 1e-5)


@pytest.mark.parametrize("delay", [2, 5, 16])
def test_a_look_ahead_of_h_takes_h_updates_off_the_delay_as_the_momentum_grows(delay):
    assert max_stable_step("ema", momentum=1 - 1e-7, delay=delay) == pytest.approx(1 / delay, rel=5e-4)
    for horizon in range(1, delay):
        edge = max_stable_step("nag", momentum=1 - 1e-7, delay=delay, horizon=horizon)
        assert edge == pytest.approx(1 / (delay - horizon), rel=5e-4)


def test_horizons_lead_from_averaging_over_nesterov_to_sgd():
    def edge(name, **options):
        return max_stable_step(name, momentum=0.9, delay=5, **options)

    assert edge("nag", horizon=0) == edge("ema")
    assert edge("nag", horizon=1) == edge("nag")
    assert edge("nag", horizon=400) == pytest.approx(edge("sgd"), rel=1e-6)


def test_every_rule_is_worth_a_horizon():
    assert linear_rule("ema").horizon == 0.0
    assert linear_rule("sgd").horizon == math.inf
    for horizon in (1.0, 2.5, 12.0):
        assert linear_rule("nag", horizon=horizon).horizon == pytest.approx(horizon)
        assert linear_rule("nag-undiscounted", horizon=horizon).horizon == pytest.approx(horizon)
    shrinking = [linear_rule("nadam", update=t).horizon for t in (10, 1000, 10_000, 100_000)]
    assert shrinking == sorted(shrinking, reverse=True)
    assert shrinking[0] == pytest.approx(math.log(0.5) / math.log(0.99), rel=0.03)
    assert shrinking[-1] == pytest.approx(1.0, rel=1e-3)


def test_eq_10_as_it_is_written():
    """The w of Eq. 10 gives ``z^(tau+2) - (1 + g) z^(tau+1) + g z^tau + a c [(1 + g) z - g]``."""
    gamma, step, tau = 0.8, 0.3, 4
    expected = np.zeros(tau + 3)
    expected[:3] = 1, -(1 + gamma), gamma
    expected[-2:] += step * (1 - gamma) * np.array([1 + gamma, -gamma])
    ours = characteristic_polynomial(linear_rule("nag", momentum=gamma), tau, step)
    np.testing.assert_allclose(ours, expected, rtol=1e-14, atol=1e-15)


def test_the_rules_have_the_optimizers_scalars():
    gamma = 0.93
    row = coefficients.nag(lr=1.0, gamma=gamma, gamma_next=gamma, weight_decay=0.0)
    rule = linear_rule("nag", momentum=gamma)
    assert (rule.c_grad, rule.c_momentum) == pytest.approx((row.c_grad, row.c_momentum), rel=1e-14)
    late = linear_rule("nadam", momentum=0.99, update=100_000)
    limit = linear_rule("nadam", momentum=0.99)
    assert (late.c_grad, late.c_momentum) == pytest.approx((limit.c_grad, limit.c_momentum), rel=1e-4)
    for t, c_grad, c_momentum in [(1, 1.0, 0.65597), (2, 0.66879, 0.56368), (100, 0.49698, 0.50310)]:
        early = linear_rule("nadam", momentum=0.99, update=t)
        assert (early.c_grad, early.c_momentum) == pytest.approx((c_grad, c_momentum), abs=1e-5)


def grows(rule: LinearRule, delay: int, step: float) -> bool:
    """Return whether the recurrence itself grows in the long run, comparing its last third with the third before."""
    run = simulate(quadratic(1.0).gradient, 1.0, rule, step=step, delay=delay, updates=40 * (delay + 1) * 40)
    size = np.abs(run.points[:, 0])
    if len(size) <= 40 * (delay + 1) * 40:
        return True  # it overflowed
    third = len(size) // 3
    return bool(size[-third:].max() > size[third : 2 * third].max())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("delay", "momentum"), [(0, 0.9), (1, 0.9), (7, 0.9), (3, 0.5)])
def test_the_recurrence_decays_below_the_edge_and_grows_above(rule, delay, momentum):
    scalars = linear_rule(rule, momentum=momentum)
    edge = max_stable_step(rule, momentum=momentum, delay=delay)
    assert not grows(scalars, delay, 0.97 * edge)
    assert grows(scalars, delay, 1.05 * edge)


@pytest.mark.parametrize("factor", [0.97, 1.05])
def test_the_optimizer_with_its_ring_has_that_edge(factor):
    """Run ``npp.NAG`` with a ``WeightStash`` on a quadratic in two dimensions, the steeper of which decides."""
    tau, momentum, steep = 5, 0.9, 3.0
    module = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    torch.nn.init.ones_(module.weight)
    stash = npp.WeightStash(module, versions=tau + 1)
    lr = factor * max_stable_step("nag", momentum=momentum, delay=tau) / steep
    optimizer = npp.NAG(module.parameters(), lr=lr, momentum=momentum, stash=stash)
    curvature = torch.tensor([[steep, 1.0]], dtype=torch.float64)
    sizes = []
    for t in range(1500):
        version = max(0, t - tau)
        with stash.use(version):
            (0.5 * curvature * module.weight**2).sum().backward()
        optimizer.step(version=version)
        sizes.append(module.weight.detach().abs().max().item())
    assert (max(sizes[-200:]) > max(sizes[200:400])) == (factor > 1)


@settings(deadline=None)
@given(
    rule=st.sampled_from(["sgd", "ema", "nag", "extrapolation", "heavy-ball"]),
    delay=st.integers(0, 24),
    momentum=st.floats(0.05, 0.99),
    horizon=st.floats(0.0, 30.0),
)
def test_companion_matrix_and_unit_circle_agree(rule, delay, momentum, horizon):
    """Compare two ways that share only the polynomial: eigenvalues with brackets, and ``a(phi)`` on the circle."""
    ahead = horizon if rule in ("nag", "extrapolation") else None
    scalars = linear_rule(rule, momentum=momentum, horizon=ahead)
    edge = max_stable_step(scalars, delay=delay)
    assert edge == pytest.approx(max_stable_step(scalars, delay=delays.fixed(delay)), rel=1e-6)
    assert spectral_radius(scalars, delay, 0.999 * edge) < 1.0 < spectral_radius(scalars, delay, 1.001 * edge)


@settings(max_examples=25, deadline=None)  # a slow, busy machine is not a failure
@given(delay=st.integers(1, 12), momentum=st.floats(0.0, 0.97))
def test_no_step_is_faster_than_the_fastest(delay, momentum):
    step, radius = fastest_step("nag", momentum=momentum, delay=delay)
    rule = linear_rule("nag", momentum=momentum)
    edge = max_stable_step(rule, delay=delay)
    assert 0 < step < edge
    assert radius == spectral_radius(rule, delay, step)
    assert min(spectral_radius(rule, delay, a) for a in np.linspace(0.01, 0.99, 150) * edge) >= radius - 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "adam"}, "unknown rule 'adam'; choose one of sgd, ema"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, not 1.0"),
        ({"momentum": math.nan}, "momentum must be"),
        ({"delay": -1}, "delay must be a whole number of updates, at least 0, not -1"),
        ({"delay": 1.5}, "delay must be a whole number"),
        ({"horizon": -1.0}, "horizon must be a number of updates, at least 0, not -1.0"),
        ({"rule": "ema", "horizon": 2}, "rule 'ema' does not look ahead"),
        ({"rule": "extrapolation", "momentum": 0.0}, "extrapolation needs a momentum above 0"),
        ({"update": 5}, "is for rule 'nadam' only"),
        ({"rule": "nadam", "update": 0}, "update must be at least 1"),
        ({"delay": delays.gamma(3.0)}, "suits the SDDE only"),
        ({"momentum": 1 - 1e-12}, "a rule needs a momentum from 0 to 1 - 1e-10 and a gain above 0"),
        ({"rule": LinearRule(0.9, 1.0, -1.0)}, "a gain above 0"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        max_stable_step(**options)
