"""Late gradients in continuous time: ``dx(t) = -b x(t - tau) dt + noise``, time in updates, ``b = lr * curvature``.

The model is the stochastic delay differential equation of arXiv 2406.11159 (from its abstract; the formulas here are
derived, and the damping ratio is that of control theory, which the paper may define otherwise). Its characteristic
equation is ``s + b E[exp(-s tau)] = 0``; for a fixed delay the roots are ``s = W_n(-b tau) / tau`` with Lambert's W.
The mean of a solution decays as ``exp(Re(s) t)`` with the rightmost root.

[note: half an update]
The discrete update with delay ``tau`` is close to this model with delay ``tau + 1/2``: the edge of the update is
``2 sin(pi / (4 tau + 2))``, that of the model with this delay ``pi / (2 tau + 1)``.
"""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nesterov_pp.analysis.crossing import first_positive
from nesterov_pp.analysis.delays import Delay, fixed

_NEWTON = 40
_STARTS = (24, 48)
_CRITICAL = 1e-9
"""Relative distance to the critical rate within which a rate counts as critical.

Roots are exact to its square root only.
"""


@dataclass(frozen=True)
class Damping:
    """The behaviour of the slowest part of a solution.

    Attributes:
        root: the rightmost root of the characteristic equation, with a non-negative imaginary part; per update.
        regime: "overdamped" (real root), "critical" (double real root: the fastest without oscillation), "underdamped"
            (it oscillates and decays), "unstable" (it does not decay).
        ratio: ``-Re(root) / |root|``, which is 1 without oscillation and 0 at the edge.
    """

    root: complex
    regime: str
    ratio: float

    @property
    def decay(self) -> float:
        """The decay rate per update: the error shrinks by ``exp(-decay)``."""
        return -self.root.real

    @property
    def period(self) -> float:
        """The period of the oscillation in updates; infinite without one."""
        return 2.0 * math.pi / self.root.imag if self.root.imag else math.inf


def roots(rate: float, delay: float, count: int = 8) -> NDArray[np.complex128]:
    """Return the ``count`` rightmost roots for a fixed delay, rightmost first: ``W_n(-rate delay) / delay``.

    Raises:
        ValueError: ``rate`` or ``delay`` is not above 0, or ``count`` is below 1.
    """
    from scipy.special import lambertw

    _check_rate(rate)
    if not 0.0 < delay < math.inf:
        raise ValueError(f"delay must be above 0, not {delay}: without one the only root is -rate")
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    branches = np.arange(-count, count + 1)
    values = np.asarray(lambertw(-rate * delay, branches)) / delay
    # At -1/e two branches meet in a double root, which scipy gives as NaN.
    values[np.isnan(values)] = -1.0 / delay
    order = np.lexsort((-values.imag, -np.round(values.real, 12)))
    return np.asarray(values[order][:count], dtype=np.complex128)


def damping(rate: float, delay: float | Delay) -> Damping:
    """Return the rightmost root and what it means.

    The root of a random delay is found by Newton's method, started from a grid over the region in which the root can
    lie, ``|s| <= rate E[exp(-Re(s) tau)]``.

    Raises:
        ValueError: ``rate`` is not above 0, the delay is negative, or every root lies where a random delay's transform
            does not converge. In the last case the error decays like the tail of the delay's distribution.
    """
    _check_rate(rate)
    given = delay if isinstance(delay, Delay) else fixed(delay)
    if given.mean == 0.0:
        return Damping(complex(-rate, 0.0), "overdamped", 1.0)
    if abs(rate / fastest_rate(given) - 1.0) < _CRITICAL:
        return Damping(complex(critical_root(given), 0.0), "critical", 1.0)
    root = _newton(rate, given) if isinstance(delay, Delay) else complex(roots(rate, delay, 1)[0])
    root = complex(root.real, abs(root.imag))
    ratio = -root.real / abs(root)
    if root.imag == 0.0:
        return Damping(root, "overdamped", ratio)
    return Damping(root, "underdamped" if root.real < 0.0 else "unstable", ratio)


def fastest_rate(delay: float | Delay) -> float:
    """Return the rate ``b`` with the fastest decay without oscillation: critical damping.

    For a fixed delay it is ``1 / (e tau)``, with decay ``1 / tau``, which no other rate exceeds; without a delay it is
    infinity. In general it is the rate of the double root, ``s = L(s) / L'(s)`` and ``b = -s / L(s)`` for the transform
    ``L``. No smaller rate decays faster, because it has a real root further right. A larger one may if the delay is
    often near 0 (geometric).

    Raises:
        ValueError: the delay is negative.
    """
    root = critical_root(delay)
    given = delay if isinstance(delay, Delay) else fixed(delay)
    return math.inf if math.isinf(root) else -root / float(given.transform(root))


def critical_root(delay: float | Delay) -> float:
    """Return the double real root ``s = L(s) / L'(s)`` at ``fastest_rate``: ``-1 / tau`` for a fixed delay.

    Raises:
        ValueError: the delay is negative.
    """
    from scipy.optimize import brentq

    given = delay if isinstance(delay, Delay) else fixed(delay)
    if given.mean == 0.0:
        return -math.inf

    def excess(s: float) -> float:
        return float(s * given.slope(s) - given.transform(s))

    # -L'(s) / L(s) is a mean of the delay weighted towards long ones, so it is at least its mean: s >= -1 / mean.
    low = max(-(1.0 + 1e-9) / given.mean, given.abscissa * (1.0 - 1e-12))
    return float(brentq(excess, low, 0.0, xtol=1e-15, rtol=1e-14))


def stability_edge(delay: float | Delay) -> float:
    """Return the rate ``b`` from which on nothing decays: ``pi / (2 tau)`` for a fixed delay.

    In general it is the smallest ``b`` with a root ``i omega``: ``i omega + b E[exp(-i omega tau)] = 0``. An
    exponential delay has none, so the result is infinity. For random delays it is the edge of the mean;
    ``max_mean_square_step`` may be far below it.

    Raises:
        ValueError: the delay is negative.
    """
    given = delay if isinstance(delay, Delay) else fixed(delay)
    if given.mean == 0.0:
        return math.inf

    def sides(omega: NDArray[np.float64]) -> tuple[NDArray[np.complex128], NDArray[np.complex128]]:
        return np.asarray(-1j * omega, dtype=np.complex128), np.asarray(
            given.transform(1j * omega), dtype=np.complex128
        )

    # At an edge b the root is at omega = b |L| <= b, so later crossings belong to larger rates.
    upper = 4.0 / given.mean
    while upper < 1e6 / given.mean:
        found = first_positive(sides, np.linspace(0.0, upper, 20_000)[1:])
        if found <= upper:
            return found
        upper *= 4.0
    return math.inf


def _newton(rate: float, delay: Delay) -> complex:
    critical = critical_root(delay)
    left = max(2.0 * critical, 0.5 * (critical + delay.abscissa))
    reach = rate * float(delay.transform(left))
    real = np.linspace(left, min(reach, rate), _STARTS[0])
    imaginary = np.linspace(0.0, reach, _STARTS[1])
    s = np.add.outer(real, 1j * imaginary).ravel()
    with np.errstate(all="ignore"):
        for _ in range(_NEWTON):
            s = s - (s + rate * delay.transform(s)) / (1.0 + rate * delay.slope(s))
        error = np.abs(s + rate * delay.transform(s))
    good = np.isfinite(s) & (error <= 1e-9 * (1.0 + rate)) & (s.real > delay.abscissa)
    if not good.any():
        raise ValueError(
            f"at rate {rate} the error decays like the tail of the delay's distribution ({delay.name}), by "
            f"exp({delay.abscissa:.3g}) per update; choose a smaller rate for an exponential decay of its own"
        )
    found = complex(max(s[good], key=lambda root: root.real))
    return complex(found.real, 0.0) if abs(cmath.phase(-found)) < 1e-7 else found


def _check_rate(rate: float) -> None:
    if not 0.0 < rate < math.inf:
        raise ValueError(f"the rate (step size times curvature) must be above 0, not {rate}")
