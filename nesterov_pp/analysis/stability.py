"""The largest stable step with late gradients, from the characteristic polynomial on a quadratic.

For curvature ``lambda`` and ``a = lr * lambda``, the recurrence of ``rules`` has the solutions ``z^t`` with::

    P(z) = z^tau (z - 1)(z - gamma) + a [c_grad (z - gamma) + c_momentum (1 - gamma) z] = 0

The recurrence is stable while every root lies within the unit circle. With random delays, independent from update to
update, ``z^-tau`` becomes its mean, and the roots are those of the mean of ``theta``. Derived for this library, and
checked against simulation; noise, a changing preconditioner and coupling between stages are not included.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nesterov_pp.analysis.crossing import first_positive
from nesterov_pp.analysis.delays import Delay, fixed
from nesterov_pp.analysis.rules import LinearRule, linear_rule

_CLOSE = 1e-6
"""The distance of a momentum from 1 below which float64 cannot tell the moduli of two eigenvalues from 1."""

_CLOSEST = 1e-10
_GROWTH = 1.05
_START = 1e-3
_BISECTIONS = 60
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def characteristic_polynomial(rule: LinearRule, delay: int, step: float) -> NDArray[np.float64]:
    """Return the ``delay + 3`` coefficients of ``P(z)``, highest power first. ``step`` is step size times curvature."""
    gamma = rule.gamma
    polynomial = np.zeros(delay + 3)
    polynomial[:3] = 1.0, -(1.0 + gamma), gamma
    polynomial[-2:] += step * np.array([rule.c_grad + rule.c_momentum * (1.0 - gamma), -rule.c_grad * gamma])
    return polynomial


def spectral_radius(rule: LinearRule, delay: int, step: float) -> float:
    """Return the factor by which an update multiplies the error in the long run.

    It is the largest modulus of the companion matrix's eigenvalues.
    """
    return float(np.abs(np.roots(characteristic_polynomial(rule, delay, step))).max())


def max_stable_step(
    rule: str | LinearRule = "nag",
    *,
    momentum: float = 0.99,
    delay: int | Delay = 0,
    horizon: float | None = None,
    update: int | None = None,
) -> float:
    """Return the largest stable step size times curvature.

    Curvature is the largest eigenvalue of the Hessian (preconditioned for nadam). The result, the edge, is where the
    first root leaves the unit circle as the step grows from 0. For a fixed delay, the edge is bracketed with the
    companion matrix's eigenvalues. For a random delay, whose polynomial may be infinite, it is found with the boundary
    ``a(phi)`` at ``z = exp(i phi)`` and the delay's transform ``E[exp(-i phi tau)]``. The same is done for a momentum
    within 1e-6 of 1, for which eigenvalues are not exact enough.

    SGD has the closed form ``2 sin(pi / (4 tau + 2))``. As ``gamma -> 1``, the edge tends to ``1 / tau`` without a
    look-ahead and to ``1 / (tau - h)`` with a horizon of ``h < tau``: the look-ahead of Eq. 10 (arXiv 2505.01099) takes
    one update off the delay.

    Args:
        rule: a name (see ``linear_rule``), or the scalars themselves.
        momentum: gamma in [0, 1) (default: 0.99).
        delay: whole updates (default: 0), or a random delay. The time grows with the cube of a fixed delay: 1 s at 100.
        horizon: updates to look ahead (default: 1), for the rules that look ahead.
        update: for nadam: the update whose scalars to use (default: their limit).

    Returns:
        The edge; for a random delay, that of the mean of the weights. Single runs may stray before this edge: see
        ``max_mean_square_step``.

    Raises:
        ValueError: a value is out of range, or a random delay is not in whole updates.
    """
    scalars = _scalars(rule, momentum, horizon, update)
    if isinstance(delay, Delay):
        return _edge_of_mean(scalars, delay)
    tau = _whole(delay)
    if 1.0 - scalars.gamma < _CLOSE:
        return _edge_of_mean(scalars, fixed(tau))
    low = high = _START / ((tau + 1) * scalars.gain)
    while spectral_radius(scalars, tau, low) >= 1.0:
        low /= 2.0
    while spectral_radius(scalars, tau, high) < 1.0:
        low, high = high, high * _GROWTH
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if spectral_radius(scalars, tau, middle) < 1.0:
            low = middle
        else:
            high = middle
    return low


def fastest_step(
    rule: str | LinearRule = "nag",
    *,
    momentum: float = 0.99,
    delay: int = 0,
    horizon: float | None = None,
    update: int | None = None,
) -> tuple[float, float]:
    """Return the step size times curvature with the smallest spectral radius, and that radius.

    The arguments are as for ``max_stable_step``. SGD has the closed forms ``tau^tau / (tau + 1)^(tau + 1)`` and
    ``tau / (tau + 1)`` (a double root).

    Raises:
        ValueError: as for ``max_stable_step``.
    """
    scalars = _scalars(rule, momentum, horizon, update)
    tau = _whole(delay)
    edge = max_stable_step(scalars, delay=tau)
    steps = edge * np.concatenate([np.geomspace(1e-4, 0.1, 60, endpoint=False), np.linspace(0.1, 1.0, 100)])
    radii = [spectral_radius(scalars, tau, float(a)) for a in steps]
    k = int(np.argmin(radii))
    best = _golden(
        lambda a: spectral_radius(scalars, tau, a),
        float(steps[max(k - 1, 0)]),
        float(steps[min(k + 1, len(steps) - 1)]),
    )
    return best, spectral_radius(scalars, tau, best)


def _scalars(rule: str | LinearRule, momentum: float, horizon: float | None, update: int | None) -> LinearRule:
    if not isinstance(rule, LinearRule):
        rule = linear_rule(rule, momentum=momentum, horizon=horizon, update=update)
    if not (0.0 <= rule.gamma <= 1.0 - _CLOSEST and rule.gain > 0.0):
        raise ValueError(f"a rule needs a momentum from 0 to 1 - {_CLOSEST:g} and a gain above 0, not {rule}")
    return rule


def _whole(delay: int) -> int:
    if int(delay) != delay or delay < 0:
        raise ValueError(f"delay must be a whole number of updates, at least 0, not {delay}")
    return int(delay)


def _edge_of_mean(rule: LinearRule, delay: Delay) -> float:
    if delay.probabilities is None:
        raise ValueError(f"discrete updates need a delay in whole updates; {delay.name} suits the SDDE only")
    gamma = rule.gamma

    def sides(phi: NDArray[np.float64]) -> tuple[NDArray[np.complex128], NDArray[np.complex128]]:
        z = np.exp(1j * phi)
        driven = (rule.c_grad * (z - gamma) + rule.c_momentum * (1.0 - gamma) * z) * delay.transform(1j * phi)
        return -(z - 1.0) * (z - gamma), driven

    fine = 16 * (len(delay.probabilities) + 2)
    grid = np.concatenate([np.geomspace(1e-7, 1e-2, 2000, endpoint=False), np.linspace(1e-2, math.pi, fine)])
    return first_positive(sides, grid)


def _golden(f: Callable[[float], float], low: float, high: float) -> float:
    """Return the place of the minimum of a function that falls, then rises."""
    for _ in range(_BISECTIONS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if f(left) <= f(right):
            high = right
        else:
            low = left
    return 0.5 * (low + high)
