"""What a step may add against late gradients, in the pass itself."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class CorrectionKind(IntEnum):
    """What is done with the gradient, and what the running mean ``a`` beside the moments is of.

    The order is that of ``CorrectionKind`` in ``csrc/update.h``.
    """

    NONE = 0
    DELAY_COMPENSATION = 1  # no running mean
    ADAPTIVE_DELAY_COMPENSATION = 2  # of the squared gradient
    GAP = 3  # of the squared update
    DISCREPANCY = 4  # of the update


HAS_MEAN = (CorrectionKind.ADAPTIVE_DELAY_COMPENSATION, CorrectionKind.GAP, CorrectionKind.DISCREPANCY)


class Correction(NamedTuple):
    """Scalars of one step, in double precision, in the order of ``Correction`` in ``csrc/update.h``.

    Where steps are counted on the device, some are tensors of many.

    Around the update of ``Coefficients``, with the weights ``s`` that the gradient was computed with::

        g  = g + strength * g g (w - s)                                   delay compensation
        a  = (1 - mean_complement) a + mean_complement g g                adaptive delay compensation,
        g  = g + strength / sqrt(a + eps) * g g (w - s)                       both with the plain g
        G  = 1 + |w - s| / (sqrt(a * inv_bias) + eps)                     gap: g and decay are divided by G
        a  = (1 - mean_complement) a + mean_complement direction^2        gap, after the update; direction is the
                                                                              quotient that is taken from w
        a  = a + mean_complement * ((w' - w) - a)                         discrepancy, after the update
        x  = w' + (ahead_last * (w' - w) - ahead_momentum * m / D)
        x  = x + ahead_mean * a                                           discrepancy

    Normalised by sign, ``m / D`` is ``sign(m)``. A difference of two infinite weights of one sign is 0. Master weights
    are compared as the parameter's dtype has them: no update between is no distance.
    """

    strength: float = 0.0
    mean_complement: float = 0.0
    inv_bias: float = 1.0
    eps: float = 0.0
    ahead_last: float = 0.0
    ahead_momentum: float = 0.0
    ahead_mean: float = 0.0
