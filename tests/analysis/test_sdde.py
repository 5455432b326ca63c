"""The continuous model: closed forms, counted roots, and integration of the equation itself."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest

from nesterov_pp.analysis import critical_root, damping, delays, fastest_rate, max_stable_step, roots, stability_edge

RANDOM = [
    delays.uniform(0, 14),
    delays.uniform(3, 5),
    delays.geometric(7),
    delays.gamma(7, 1),
    delays.gamma(7, 4),
    delays.trace([1, 1, 30]),
    delays.trace([0] * 9 + [50]),
]


@pytest.mark.parametrize("delay", [0.5, 1, 7, 31.5])
def test_a_fixed_delay_has_closed_forms(delay):
    for given in (delay, delays.fixed(delay)):
        assert stability_edge(given) == pytest.approx(math.pi / (2 * delay), rel=1e-12)
        assert fastest_rate(given) == pytest.approx(1 / (math.e * delay), rel=1e-12)
        assert critical_root(given) == pytest.approx(-1 / delay, rel=1e-7)


@pytest.mark.parametrize("rate", [0.01, 0.05, 1 / (7 * math.e), 0.2, 0.3, 2.0])
def test_roots_solve_the_characteristic_equation_rightmost_first(rate):
    found = roots(rate, 7, count=9)
    assert len(found) == 9
    np.testing.assert_allclose(found + rate * np.exp(-7 * found), 0, atol=1e-12)
    assert list(found.real) == pytest.approx(sorted(found.real, reverse=True))
    assert found[0].real == pytest.approx(damping(rate, 7).root.real)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99, 1.01, 2.0, 4.2, 4.3, 8.0])
@pytest.mark.parametrize("delay", RANDOM, ids=lambda d: d.name)
def test_no_root_lies_right_of_the_one_that_was_found(delay, share):
    """Count the roots by how often ``f(s) = s + b L(s)`` winds around 0 along a half disc that holds all roots to the
    right of a line."""
    rate = share * fastest_rate(delay)
    root = damping(rate, delay).root
    assert abs(root + rate * delay.transform(root)) < 1e-9
    gap = 1e-3 * abs(root)
    assert roots_right_of(root.real + gap, rate, delay) == 0
    if root.real - gap > delay.abscissa:
        assert roots_right_of(root.real - gap, rate, delay) >= 1


def roots_right_of(line: float, rate: float, delay: delays.Delay) -> int:
    reach = 1.1 * (rate * float(delay.transform(line)) + abs(line))
    up = line + 1j * np.linspace(-reach, reach, 80_001)
    arc = line + reach * np.exp(1j * np.linspace(math.pi / 2, -math.pi / 2, 20_001))
    along = np.concatenate([up, arc])
    values = along + rate * delay.transform(along)
    turned = np.angle(values[1:] / values[:-1])
    assert np.abs(turned).max() < 1.0  # the grid is fine enough to follow the angle
    return round(-float(turned.sum()) / (2 * math.pi))


@pytest.mark.parametrize("shape", [1.5, 2, 3, 10, 1000])
def test_a_gamma_delay_has_a_closed_edge(shape):
    """On the imaginary axis, ``arg s (1 + s theta)^k = pi`` gives ``omega theta = tan(pi / 2k)``."""
    angle = math.pi / (2 * shape)
    edge = math.tan(angle) * shape / 7 / math.cos(angle) ** shape
    assert stability_edge(delays.gamma(7, shape)) == pytest.approx(edge, rel=1e-9)


def test_an_exponential_delay_is_a_second_order_system():
    """``s (1 + s theta) + b = 0`` is critical at ``b = 1 / (4 theta)`` and never unstable."""
    delay = delays.gamma(7, 1)
    assert stability_edge(delay) == math.inf
    assert fastest_rate(delay) == pytest.approx(1 / 28, rel=1e-9)
    for rate in (0.01, 0.2, 3.0):
        expected = (-1 + cmath.sqrt(1 - 28 * rate)) / 14
        assert damping(rate, delay).root == pytest.approx(expected, rel=1e-9)


def test_regimes_follow_each_other_as_the_rate_grows():
    for delay in (7, delays.fixed(7), delays.uniform(4, 10), delays.gamma(7, 3)):
        critical, edge = fastest_rate(delay), stability_edge(delay)
        rates = [0.5 * critical, critical, 1.5 * critical, 0.99 * edge, 1.01 * edge]
        seen = [damping(rate, delay) for rate in rates]
        assert [d.regime for d in seen] == ["overdamped", "critical", "underdamped", "underdamped", "unstable"]
        assert [d.ratio for d in seen[:2]] == [1.0, 1.0]
        assert 1.0 > seen[2].ratio > seen[3].ratio > 0.0 > seen[4].ratio
        assert seen[1].decay > max(seen[0].decay, seen[2].decay)
        assert seen[0].period == math.inf > seen[3].period > 0.0
    assert damping(0.3, 0).root == -0.3


def integrate(rate: float, values: list[int], shares: list[float], length: int) -> np.ndarray:
    """Integrate ``x' = -rate sum_k p_k x(t - tau_k)``, ``x = 1`` up to 0, by Heun's method, 200 steps per update."""
    h = 1 / 200
    lag = [200 * v for v in values]
    start = max(lag)
    x = np.ones(start + 200 * length + 1)
    for n in range(start, len(x) - 1):
        slope = -rate * sum(p * x[n - k] for p, k in zip(shares, lag, strict=True))
        after = -rate * sum(p * (x[n + 1 - k] if k else x[n] + h * slope) for p, k in zip(shares, lag, strict=True))
        x[n + 1] = x[n] + 0.5 * h * (slope + after)
    return x[start:]


@pytest.mark.parametrize(("delay", "values"), [(delays.fixed(3), [3]), (delays.uniform(0, 4), [0, 1, 2, 3, 4])])
@pytest.mark.parametrize("share", [0.5, 2.5])
def test_the_equation_itself_decays_like_the_rightmost_root(delay, values, share):
    rate = share * fastest_rate(delay)
    expected = damping(rate, delay)
    x = integrate(rate, values, [1 / len(values)] * len(values), 80)
    # At points whole periods apart, the oscillation is in the same phase.
    apart = 35.0 if expected.period == math.inf else expected.period * (35 // expected.period)
    first, last = x[200 * 20], x[200 * 20 + round(200 * apart)]
    assert math.log(first / last) / apart == pytest.approx(expected.decay, rel=1e-3)


def test_the_discrete_update_is_half_an_update_later():
    for tau in (3, 7, 31):
        assert max_stable_step("sgd", delay=tau) == pytest.approx(stability_edge(tau + 0.5), rel=0.02)
        assert abs(max_stable_step("sgd", delay=tau) / stability_edge(tau) - 1) > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: roots(0.0, 7), "rate .* must be above 0, not 0.0"),
        (lambda: roots(0.1, 0.0), "delay must be above 0"),
        (lambda: roots(0.1, 7, 0), "count must be at least 1"),
        (lambda: damping(-1.0, 7), "rate .* must be above 0"),
        (lambda: damping(math.nan, 7), "rate .* must be above 0"),
        (lambda: stability_edge(-1.0), "a delay must be a number of updates, at least 0"),
        (lambda: fastest_rate(math.inf), "a delay must be a number of updates"),
        (lambda: delays.uniform(5, 2), "not 5 to 2"),
        (lambda: delays.geometric(0), "the mean of a geometric delay must be above 0"),
        (lambda: delays.gamma(3, 0.5), "a shape of at least 1"),
        (lambda: delays.trace([]), "at least one delay"),
        (lambda: delays.trace([1, -2]), "whole numbers from 0 to 1000 only"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
