"""Random delays: their transforms, the stability edge of the mean and that of the mean square."""

from __future__ import annotations

import numpy as np
import pytest

from nesterov_pp.analysis import (
    LinearRule,
    delays,
    linear_rule,
    max_mean_square_step,
    max_stable_step,
    mean_square_radius,
    quadratic,
    simulate,
)

DELAYS = [
    delays.fixed(4),
    delays.uniform(2, 9),
    delays.geometric(5),
    delays.gamma(6, 3),
    delays.trace([1, 2, 2, 8]),
]


@pytest.mark.parametrize("delay", DELAYS, ids=lambda d: d.name)
def test_transforms_belong_to_their_distributions(delay):
    """At 0, a transform is 1 and its slope minus the mean; elsewhere, they match draws and difference quotients."""
    draw = np.random.default_rng(0)
    if delay.probabilities is None:
        drawn = draw.gamma(3, 2, size=200_000)
    else:
        drawn = draw.choice(len(delay.probabilities), size=200_000, p=delay.probabilities)
    assert delay.transform(0.0) == pytest.approx(1.0)
    assert -delay.slope(0.0) == pytest.approx(delay.mean)
    assert drawn.mean() == pytest.approx(delay.mean, rel=0.02)
    for s in (0.3, 0.2 + 0.7j, -0.02 - 0.1j):
        assert abs(delay.transform(s) - np.exp(-s * drawn).mean()) < 0.01
        quotient = (delay.transform(s + 1e-6) - delay.transform(s - 1e-6)) / 2e-6
        assert delay.slope(s) == pytest.approx(quotient, rel=1e-6)
    grid = np.array([[0.1, 0.2], [0.3j, 0.4]])
    assert delay.transform(grid)[1, 0] == pytest.approx(delay.transform(0.3j))


@pytest.mark.parametrize("mean", [0.5, 3, 7])
def test_geometric_delays_have_a_closed_edge_of_the_mean(mean):
    """``(z - 1)(z - q) + a p z = 0`` leaves the circle at -1: ``a = 2 (1 + 2 mean)``."""
    assert max_stable_step("sgd", delay=delays.geometric(mean)) == pytest.approx(2 * (1 + 2 * mean), rel=1e-9)


@pytest.mark.parametrize("rule", ["sgd", "ema", "nag"])
def test_a_random_delay_that_is_always_the_same_is_a_fixed_one(rule):
    edge = max_stable_step(rule, momentum=0.9, delay=6)
    assert max_stable_step(rule, momentum=0.9, delay=delays.trace([6, 6])) == pytest.approx(edge, rel=1e-9)
    assert max_mean_square_step(rule, momentum=0.9, delay=delays.fixed(6)) == pytest.approx(edge, rel=2e-6)


def transition(rule: LinearRule, late: int, longest: int, step: float) -> np.ndarray:
    """Return the matrix of one update with one delay, from the recurrence; the state is theta_t ... theta_{t-D}, m."""
    identity = np.eye(longest + 2)
    momentum = rule.gamma * identity[-1] + (1 - rule.gamma) * identity[late]
    theta = identity[0] - step * (rule.c_grad * identity[late] + rule.c_momentum * momentum)
    return np.vstack([theta, identity[:longest], momentum])


@pytest.mark.parametrize("name", ["sgd", "ema", "nag"])
@pytest.mark.parametrize("step", [0.05, 0.3, 1.2])
def test_the_mean_square_radius_is_that_of_the_kronecker_square(name, step):
    rule, shares = linear_rule(name, momentum=0.8), [0.2, 0.1, 0.4, 0.3]
    delay = delays.trace([0, 0, 1, 2, 2, 2, 2, 3, 3, 3])
    matrices = [transition(rule, late, 3, step) for late in range(4)]
    square = sum(p * np.kron(a, a) for p, a in zip(shares, matrices, strict=True))
    expected = np.abs(np.linalg.eigvals(square)).max()
    assert mean_square_radius(rule, delay, step) == pytest.approx(expected, rel=1e-7)


def test_the_mean_follows_the_averaged_recurrence():
    """The mean of 10,000 runs with drawn delays is the recurrence with the averaged gradient, within four errors."""
    delay, rule, step, updates = delays.uniform(0, 4), linear_rule("nag", momentum=0.8), 0.1, 30
    draw = np.random.default_rng(1)
    late = draw.integers(0, 5, size=(updates, 10_000))
    points = np.ones((updates + 1, 10_000))
    mean = np.ones(updates + 1)
    momentum, mean_momentum = np.zeros(10_000), 0.0
    for t in range(updates):
        gradient = points[np.maximum(0, t - late[t]), np.arange(10_000)]
        momentum = rule.gamma * momentum + (1 - rule.gamma) * gradient
        points[t + 1] = points[t] - step * (rule.c_grad * gradient + rule.c_momentum * momentum)
        averaged = sum(p * mean[max(0, t - k)] for k, p in enumerate(delay.probabilities))
        mean_momentum = rule.gamma * mean_momentum + (1 - rule.gamma) * averaged
        mean[t + 1] = mean[t] - step * (rule.c_grad * averaged + rule.c_momentum * mean_momentum)
    error = points.std(axis=1) / 100
    assert (np.abs(points.mean(axis=1) - mean) <= 4 * error + 1e-12).all()


def test_single_runs_stray_long_before_their_mean_does():
    """Under geometric delays of mean 7, the mean of SGD tolerates a step of 30, the mean square about 0.5."""
    delay = delays.geometric(7)
    assert max_stable_step("sgd", delay=delay) == pytest.approx(30)
    edge = max_mean_square_step("sgd", delay=delay)
    assert 0.4 < edge < 0.6
    draw = np.random.default_rng(2)
    sizes = {}
    for factor in (0.9, 2.0):
        late = draw.choice(len(delay.probabilities), size=3000, p=delay.probabilities)
        run = simulate(
            quadratic(1.0).gradient, 1.0, linear_rule("sgd"), step=factor * edge, delay=late.tolist(), updates=3000
        )
        sizes[factor] = np.abs(run.points[-20:]).max()
    assert sizes[0.9] < 1e-6
    assert sizes[2.0] > 1e6


def test_what_mean_squares_cannot_do_is_said():
    with pytest.raises(ValueError, match="needs a delay in whole updates"):
        max_mean_square_step("sgd", delay=delays.gamma(3))
    with pytest.raises(ValueError, match="of at most 300 updates"):
        max_mean_square_step("sgd", delay=delays.fixed(301))
