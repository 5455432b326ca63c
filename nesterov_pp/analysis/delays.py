"""Delays that are drawn anew for each update, described by their Laplace transforms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Transform = Callable[[Any], Any]

LONGEST = 1000
"""The largest random delay in whole updates, and the largest mean of a geometric delay."""

_TAIL = 1e-9
"""The probability of the tail that is cut from an unbounded delay."""


@dataclass(frozen=True)
class Delay:
    """A delay in updates; a random delay is independent from update to update.

    Attributes:
        name: for display.
        mean: the mean of the delay.
        transform: ``s -> E[exp(-s tau)]``, for real or complex numbers or arrays.
        slope: the derivative of ``transform``.
        abscissa: the transform converges to the right of this value.
        probabilities: the probabilities of 0, 1, 2, ... updates; None if the delay need not be whole, or is above 1000.
            From an unbounded delay a tail of 1e-9 is cut.
    """

    name: str
    mean: float
    transform: Transform
    slope: Transform
    abscissa: float = -math.inf
    probabilities: NDArray[np.float64] | None = None


def fixed(delay: float) -> Delay:
    """Return a delay that is always the same.

    Raises:
        ValueError: ``delay`` is negative or not finite.
    """
    if not 0.0 <= delay < math.inf:
        raise ValueError(f"a delay must be a number of updates, at least 0, not {delay}")
    return _finite(f"fixed {delay:g}", [delay], [1.0])


def uniform(low: int, high: int) -> Delay:
    """Return a delay that is a whole number from ``low`` to ``high``, both included, all equally likely.

    Raises:
        ValueError: ``0 <= low <= high <= 1000`` does not hold.
    """
    if not 0 <= low <= high <= LONGEST:
        raise ValueError(f"a uniform delay needs whole numbers with 0 <= low <= high <= {LONGEST}, not {low} to {high}")
    values = range(low, high + 1)
    return _finite(f"uniform {low} to {high}", values, [1.0 / len(values)] * len(values))


def trace(delays: Sequence[int]) -> Delay:
    """Return a delay that is drawn from observed ones.

    Raises:
        ValueError: ``delays`` is empty, or one of them is negative or above 1000.
    """
    counts = Counter(delays)
    if not counts or min(counts) < 0 or max(counts) > LONGEST:
        raise ValueError(f"a trace must hold at least one delay, and whole numbers from 0 to {LONGEST} only")
    values = sorted(counts)
    return _finite(f"trace of {len(delays)}", values, [counts[v] / len(delays) for v in values])


def geometric(mean: float) -> Delay:
    """Return a geometric delay, as of workers that finish without memory.

    ``P(tau = k) = p (1 - p)^k`` from ``k = 0`` on, with ``p = 1 / (1 + mean)``, and
    ``E[exp(-s tau)] = p / (1 - (1 - p) exp(-s))``.

    Raises:
        ValueError: ``mean`` is not above 0, or is above 1000.
    """
    if not 0.0 < mean <= LONGEST:
        raise ValueError(f"the mean of a geometric delay must be above 0 and at most {LONGEST}, not {mean}")
    p = 1.0 / (1.0 + mean)
    q = 1.0 - p

    def slope(s: Any) -> Any:
        decayed = q * np.exp(-s)
        return -p * decayed / (1.0 - decayed) ** 2

    length = math.ceil(math.log(_TAIL) / math.log(q))
    shares = p * q ** np.arange(length)
    return Delay(
        f"geometric, mean {mean:g}",
        mean,
        lambda s: p / (1.0 - q * np.exp(-s)),
        slope,
        abscissa=math.log(q),
        probabilities=shares / shares.sum(),
    )


def gamma(mean: float, shape: float = 1.0) -> Delay:
    """Return a gamma-distributed delay, in continuous time; ``shape`` 1 is exponential, a large one nearly fixed.

    ``E[exp(-s tau)] = (1 + s mean / shape)^-shape``.

    Raises:
        ValueError: ``mean`` is not above 0, or ``shape`` is below 1.
    """
    if not (0.0 < mean < math.inf and 1.0 <= shape < math.inf):
        raise ValueError(f"a gamma delay needs a mean above 0 and a shape of at least 1, not {mean} and {shape}")
    scale = mean / shape
    return Delay(
        f"gamma, mean {mean:g}, shape {shape:g}",
        mean,
        lambda s: (1.0 + s * scale) ** -shape,
        lambda s: -mean * (1.0 + s * scale) ** (-shape - 1.0),
        abscissa=-1.0 / scale,
    )


def from_text(text: str) -> Delay:
    """Return the delay that a text describes.

    The text is ``uniform:LOW:HIGH``, ``geometric:MEAN``, ``gamma:MEAN:SHAPE`` or ``trace:FILE``. A trace is a text file
    of whole numbers separated by spaces, commas or newlines.

    Raises:
        ValueError: the text describes no delay, or the file cannot be read.
    """
    kind, *rest = text.split(":")
    try:
        if kind == "uniform" and len(rest) == 2:
            return uniform(_whole(rest[0]), _whole(rest[1]))
        if kind == "geometric" and len(rest) == 1:
            return geometric(_number(rest[0]))
        if kind == "gamma" and len(rest) == 2:
            return gamma(_number(rest[0]), _number(rest[1]))
        if kind == "trace" and rest:
            return trace(_read_trace(Path(":".join(rest))))
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    raise ValueError(f"needs uniform:LOW:HIGH, geometric:MEAN, gamma:MEAN:SHAPE or trace:FILE, not {text!r}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


def _read_trace(path: Path) -> list[int]:
    try:
        words = path.read_text(encoding="utf-8").replace(",", " ").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the file cannot be read ({getattr(error, 'strerror', None) or 'not a text file'})") from None
    return [_whole(word) for word in words]


def _finite(name: str, values: Sequence[float], shares: Sequence[float]) -> Delay:
    points, weights = np.asarray(values, dtype=np.float64), np.asarray(shares, dtype=np.float64)
    probabilities = None
    if np.all(points == np.round(points)) and points.max() <= LONGEST:
        probabilities = np.zeros(int(points.max()) + 1)
        probabilities[points.astype(int)] = weights
    return Delay(
        name,
        float(points @ weights),
        lambda s: np.exp(-np.multiply.outer(s, points)) @ weights,
        lambda s: -np.exp(-np.multiply.outer(s, points)) @ (weights * points),
        probabilities=probabilities,
    )
