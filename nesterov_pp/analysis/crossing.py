"""The first ``a``, growing from 0, at which ``numerator = a * denominator`` has a root on a curve."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Sides = Callable[[NDArray[np.float64]], tuple[NDArray[np.complex128], NDArray[np.complex128]]]


def first_positive(sides: Sides, grid: NDArray[np.float64]) -> float:
    """Return the smallest positive ``a = numerator / denominator`` over the parameters at which the quotient is real.

    The result is infinity if there is none.

    Args:
        sides: maps parameters to numerator and denominator on the curve.
        grid: increasing parameters, dense enough that the imaginary part changes sign at most once between two. The
            quotient at the last one is taken as real if it is real up to rounding.
    """
    from scipy.optimize import brentq

    def imaginary(x: float) -> float:
        top, bottom = sides(np.array([x]))
        return float((top * bottom.conj()).imag[0])

    top, bottom = sides(grid)
    product = top * bottom.conj()
    turns = np.flatnonzero(np.sign(product.imag[:-1]) * np.sign(product.imag[1:]) < 0.0)
    real = [brentq(imaginary, grid[k], grid[k + 1], xtol=1e-15, rtol=1e-14) for k in turns]
    if abs(product.imag[-1]) <= 1e-9 * abs(product[-1]):
        real.append(float(grid[-1]))
    if not real:
        return math.inf
    top, bottom = sides(np.array(real))
    size = np.abs(bottom) ** 2
    values = (top * bottom.conj()).real[size > 0.0] / size[size > 0.0]
    return float(min(values[values > 0.0], default=math.inf))
