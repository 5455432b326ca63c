"""The scalars of one step, the only thing in which the optimizers of the family differ."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Normaliser(IntEnum):
    """What becomes of a rule's momentum before it is taken from the weights. The order is that of ``csrc/update.h``."""

    NONE = 0
    RMS = 1  # divided by the root of a second moment
    SIGN = 2


class Coefficients(NamedTuple):
    """Scalars of the update, in double precision, in the order of ``Coefficients`` in ``csrc/update.h``.

    With gradient ``g``, weights ``w`` and moments ``m`` and ``v``::

        g  = grad_scale * grad + l2 * w
        m' = m + beta1_complement * (g - m)
        v' = (1 - beta2_complement) * v + beta2_complement * g * g           normalised by rms only
        w' = w - (decay * w + direction)

        direction = c_grad * g + c_momentum * m'                             normalised by nothing
        direction = (c_grad * g + c_momentum * m') / (sqrt(v' * inv_bias2) + eps)              by rms
        direction = sign(c_grad * g + c_momentum * m) * inv_bias2            by sign: m is the one before the step,
                                                                             and inv_bias2 the size of the step

    How ``m`` and ``v`` are rounded, and what becomes of numbers that are not finite, is in ``csrc/update.h``.
    """

    grad_scale: float
    l2: float
    beta1_complement: float
    beta2_complement: float
    decay: float
    c_grad: float
    c_momentum: float
    inv_bias2: float
    eps: float
