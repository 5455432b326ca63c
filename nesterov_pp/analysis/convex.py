"""Late gradients on convex objectives, simulated step by step in float64, and the rates to expect.

Theorem 1 of arXiv 2505.01099 claims ``f - f* = O(1 / t)`` for the discounted look-ahead with ``gamma_t = (t - 2) / t``
under a fixed delay, for convex, ``beta``-smooth objectives with bounded gradients (as digests of the paper state it;
its proof was not available). The step size that it is quoted with, ``1 / beta``, cannot be the whole statement for
delays of 2 and more. On a quadratic of curvature ``lambda``, that schedule has the envelope (derived, and checked by
simulation)::

    f(w_t) ~ t^(-3/2 + 2 lr lambda (tau - 1))

which is ``O(1 / t)`` for ``lr lambda (tau - 1) <= 1/4`` and does not decrease at all from ``3/4`` on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nesterov_pp.analysis.rules import LinearRule
from nesterov_pp.optim.nag import convex_schedule

Vector = NDArray[np.float64]
Schedule = Callable[[int], LinearRule]


@dataclass(frozen=True)
class Objective:
    """A convex function with minimum 0 at the origin.

    ``value`` takes any number of points, along the last axis; ``gradient`` takes one.
    """

    value: Callable[[Vector], Vector]
    gradient: Callable[[Vector], Vector]
    smoothness: float


def quadratic(curvatures: ArrayLike) -> Objective:
    """Return ``f(w) = 1/2 sum_i lambda_i w_i^2``.

    Raises:
        ValueError: a curvature is negative, or all are 0.
    """
    bend = np.atleast_1d(np.asarray(curvatures, dtype=np.float64))
    if bend.min() < 0.0 or bend.max() <= 0.0:
        raise ValueError(f"curvatures must be at least 0 and not all 0, not {bend.tolist()}")
    return Objective(lambda w: 0.5 * (w * w) @ bend, lambda w: bend * w, float(bend.max()))


def log_cosh() -> Objective:
    """Return ``f(w) = sum_i log cosh w_i``.

    It is convex and 1-smooth, with gradients ``tanh w_i`` within 1, and flat far from 0.
    """
    return Objective(
        lambda w: (np.logaddexp(w, -w) - np.log(2.0)).sum(axis=-1),
        np.tanh,
        1.0,
    )


def convex_rule(t: int) -> LinearRule:
    """Return the discounted look-ahead at update ``t`` = 1, 2, ...

    It has Theorem 1's ``gamma_t = (t - 2) / t`` (0 at first).
    """
    gamma = convex_schedule(t)
    return LinearRule(gamma, 1.0 - gamma, convex_schedule(t + 1))


def safe_convex_step(smoothness: float, delay: int) -> float:
    """Return ``1 / (4 beta max(1, tau - 1))``.

    For a delay of 2 or more, it is the largest step whose envelope on a quadratic of curvature ``beta`` is
    ``O(1 / t)``. Derived.
    """
    return 1.0 / (4.0 * smoothness * max(1, delay - 1))


def envelope_power(step: float, delay: int) -> float:
    """Return the exponent of t in the envelope at the top of this module. Derived, for a delay of at least 1.

    ``step`` is the step size times curvature.
    """
    return -1.5 + 2.0 * step * (delay - 1)


@dataclass(frozen=True)
class Trajectory:
    """The result of ``simulate``, in arrays of shape ``[updates + 1, n]``.

    ``weights`` are w_t of Eq. 10; ``points`` are the look-aheads, at which gradients are taken.
    """

    weights: Vector
    points: Vector


def simulate(
    gradient: Callable[[Vector], Vector],
    start: ArrayLike,
    rule: LinearRule | Schedule,
    *,
    step: float,
    delay: int | Sequence[int],
    updates: int,
) -> Trajectory:
    """Run the recurrence of ``rules`` from rest: ``g_t`` is the gradient at ``points[max(0, t - delay)]``.

    Args:
        gradient: the gradient at one point, ``[n]``; may add noise.
        start: the first point, ``[n]``.
        rule: scalars, or a function of the update ``t`` = 1, 2, ...
        step: learning rate.
        delay: the delay in updates, one for all updates or one for each.
        updates: number of updates. If the numbers overflow, the result ends early, with the last finite point.

    Raises:
        ValueError: ``updates`` is below 1, a delay is negative, or there are fewer delays than updates.
    """
    if updates < 1:
        raise ValueError(f"updates must be at least 1, not {updates}")
    delays = [delay] * updates if isinstance(delay, int) else list(delay)
    if len(delays) < updates or min(delays) < 0:
        raise ValueError(f"each of the {updates} updates needs a delay of at least 0")
    schedule = rule if callable(rule) else lambda _: rule
    first = np.atleast_1d(np.asarray(start, dtype=np.float64))
    points = np.empty((updates + 1, *first.shape))
    weights = np.empty_like(points)
    points[0] = weights[0] = first
    momentum = np.zeros_like(first)
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(updates):
            now = schedule(t + 1)
            late = gradient(points[max(0, t - delays[t])])
            momentum = now.gamma * momentum + (1.0 - now.gamma) * late
            weights[t + 1] = weights[t] - step * momentum
            points[t + 1] = points[t] - step * (now.c_grad * late + now.c_momentum * momentum)
            if not np.isfinite(points[t + 1]).all():
                return Trajectory(weights[: t + 1], points[: t + 1])
    return Trajectory(weights, points)


def measured_power(values: Vector, *, skip: float = 0.03, windows: int = 24) -> float:
    """Return the exponent of the envelope of ``values[t]``.

    It is the slope of a line through the logarithms of the maxima of equal windows of ``log t``. The first ``skip`` of
    the updates (a fraction) is left out.

    Raises:
        ValueError: there are too few values for ``windows``.
    """
    edges = np.unique(np.geomspace(max(2.0, skip * len(values)), len(values), windows + 1).astype(int))
    if len(edges) < windows + 1:
        raise ValueError(f"{len(values)} values are too few for {windows} windows")
    pairs = list(pairwise(edges))
    peaks = [values[a:b].max() for a, b in pairs]
    return float(np.polyfit(np.log([np.sqrt(a * b) for a, b in pairs]), np.log(peaks), 1)[0])
