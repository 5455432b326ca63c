"""Simulated rates on convex objectives, and the simulator checked against the optimizer itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import nesterov_pp as npp
from nesterov_pp.analysis import (
    Trajectory,
    convex_rule,
    envelope_power,
    linear_rule,
    log_cosh,
    max_stable_step,
    measured_power,
    quadratic,
    safe_convex_step,
    simulate,
)
from nesterov_pp.optim.nag import convex_schedule


def run(objective, start, *, step, delay, updates=20_000) -> np.ndarray:
    trajectory = simulate(objective.gradient, start, convex_rule, step=step, delay=delay, updates=updates)
    return objective.value(trajectory.weights)


@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("schedule", ["constant", "convex"])
def test_the_simulator_is_eq_10_and_the_optimizer(delay, schedule):
    """``w_{t+1} = w_t + d_t - lr (1 - gamma_t) f'(w_{t-tau} + d_{t-tau})``, ``d_t = gamma_t (w_t - w_{t-1})``."""
    objective, start, step, updates = quadratic([1.0, 0.2]), [1.0, -2.0], 0.05, 60
    gamma = convex_schedule if schedule == "convex" else lambda _: 0.9
    rule = convex_rule if schedule == "convex" else linear_rule("nag", momentum=0.9)
    ours = simulate(objective.gradient, start, rule, step=step, delay=delay, updates=updates)
    w = [np.array(start), np.array(start)]  # w_{-1} = w_0: at rest
    looks = []
    for t in range(1, updates + 1):
        d = gamma(t) * (w[-1] - w[-2])
        looks.append(w[-1] + d)
        late = objective.gradient(looks[max(0, t - 1 - delay)])
        w.append(w[-1] + d - step * (1 - gamma(t)) * late)
    np.testing.assert_allclose(ours.weights, w[1:], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(ours.points[:-1], looks, rtol=1e-12, atol=1e-13)

    module = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([start]))
    stash = npp.WeightStash(module, versions=delay + 1)
    optimizer = npp.NAG(module.parameters(), lr=step, momentum=gamma if schedule == "convex" else 0.9, stash=stash)
    curvature = torch.tensor([[1.0, 0.2]], dtype=torch.float64)
    for t in range(updates):
        with stash.use(max(0, t - delay)):
            (0.5 * curvature * module.weight**2).sum().backward()
        optimizer.step(version=max(0, t - delay))
    np.testing.assert_allclose(module.weight.detach().numpy()[0], ours.points[-1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("delay", [2, 3, 7])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_envelope_on_a_quadratic_has_the_derived_power(delay, share):
    """The power is ``-3/2 + 2 lr lambda (tau - 1)``: -1 at a share of 1/4, and no decay at 3/4."""
    step = share / (delay - 1)
    values = run(quadratic(1.0), 1.0, step=step, delay=delay)
    assert envelope_power(step, delay) == pytest.approx(2 * share - 1.5)
    assert measured_power(values) == pytest.approx(2 * share - 1.5, abs=0.1)


@pytest.mark.parametrize("delay", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("objective", "start"),
    [(quadratic([1.0, 0.3, 0.01]), [1.0, 1.0, 1.0]), (log_cosh(), [3.0, -0.5])],
    ids=["quadratic", "log-cosh"],
)
def test_the_gap_is_o_of_1_over_t_at_the_safe_step(objective, start, delay):
    """``t (f - f*)`` peaks early and does not rise again, whatever the curvatures of the directions."""
    values = run(objective, start, step=safe_convex_step(objective.smoothness, delay), delay=delay)
    scaled = np.arange(len(values)) * values
    assert scaled[8000:].max() <= 1.02 * scaled[:8000].max()
    assert values[-2000:].max() < 0.02 * values[0]


@pytest.mark.parametrize(("delay", "level"), [(2, 0.66), (3, 2.8), (7, 10.8)])
def test_log_cosh_does_not_converge_at_the_step_the_theorem_is_quoted_with(delay, level):
    """The step ``1 / beta`` with a delay of 2 or more gives a lasting oscillation with a constant envelope."""
    values = run(log_cosh(), 3.0, step=1.0, delay=delay, updates=30_000)
    assert values[-10_000:].max() == pytest.approx(level, rel=0.05)
    assert values[-1000:].max() > 0.95 * values[-20_000:-19_000].max()


def test_without_much_delay_the_quoted_step_does_converge():
    for delay in (0, 1):
        values = run(log_cosh(), 3.0, step=1.0, delay=delay)
        assert values[-1000:].max() < 1e-4


def test_log_cosh_is_what_it_says():
    objective = log_cosh()
    w = np.array([[0.3, -2.0], [800.0, 0.0]])
    assert objective.value(w)[0] == pytest.approx(math.log(math.cosh(0.3)) + math.log(math.cosh(2.0)))
    assert objective.value(w)[1] == pytest.approx(800 - math.log(2))  # cosh itself would overflow
    slope = (objective.value(w[0] + [1e-6, 0]) - objective.value(w[0] - [1e-6, 0])) / 2e-6
    assert objective.gradient(w[0])[0] == pytest.approx(slope, rel=1e-8)


@pytest.mark.parametrize("power", [-2.0, -1.0, 0.0, 0.5])
def test_a_power_that_is_known_is_measured(power):
    t = np.arange(1, 20_001, dtype=np.float64)
    assert measured_power(t**power * np.cos(0.7 * t) ** 2) == pytest.approx(power, abs=0.03)


def test_what_overflows_ends_early_and_finite():
    edge = max_stable_step("sgd", delay=5)
    values = simulate(quadratic(1.0).gradient, 1.0, linear_rule("sgd"), step=50 * edge, delay=5, updates=3000)
    assert isinstance(values, Trajectory)
    assert 10 < len(values.points) == len(values.weights) < 3000
    assert np.isfinite(values.points).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quadratic([1.0, -1.0]), "curvatures must be at least 0"),
        (lambda: quadratic(0.0), "not all 0"),
        (lambda: simulate(np.tanh, 1.0, convex_rule, step=1.0, delay=1, updates=0), "updates must be at least 1"),
        (lambda: simulate(np.tanh, 1.0, convex_rule, step=1.0, delay=-1, updates=2), "a delay of at least 0"),
        (lambda: simulate(np.tanh, 1.0, convex_rule, step=1.0, delay=[1], updates=2), "each of the 2 updates needs"),
        (lambda: measured_power(np.ones(10)), "too few for 24 windows"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
