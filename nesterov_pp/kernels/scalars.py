"""The scalars of one step: those of its rule, and those of its correction of late gradients."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Normaliser(IntEnum):
    """The normalisation of the momentum before it is subtracted from the weights, in the order of ``csrc/update.h``."""

    NONE = 0
    RMS = 1  # divided by the root of a second moment
    SIGN = 2


class Coefficients(NamedTuple):
    """The scalars of the update, in double precision, in the order of ``Coefficients`` in ``csrc/update.h``.

    With gradient ``g``, weights ``w`` and moments ``m`` and ``v``::

        g  = grad_scale * grad + l2 * w
        m' = m + beta1_complement * (g - m)
        v' = (1 - beta2_complement) * v + beta2_complement * g * g           normalised by rms only
        w' = w - (decay * w + direction)

        direction = c_grad * g + c_momentum * m'                             normalised by nothing
        direction = (c_grad * g + c_momentum * m') / (sqrt(v' * inv_bias2) + eps)              by rms
        direction = sign(c_grad * g + c_momentum * m) * inv_bias2            by sign: m is the one before the step,
                                                                             and inv_bias2 the size of the step

    ``csrc/update.h`` describes how ``m`` and ``v`` are rounded and how numbers that are not finite are treated.
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


class CorrectionKind(IntEnum):
    """The kind of a correction, with the quantity that its running mean ``a`` averages.

    The order is that of ``CorrectionKind`` in ``csrc/update.h``.
    """

    NONE = 0
    DELAY_COMPENSATION = 1  # no running mean
    ADAPTIVE_DELAY_COMPENSATION = 2  # mean of the squared gradient
    GAP = 3  # mean of the squared update
    DISCREPANCY = 4  # mean of the update


HAS_MEAN = (CorrectionKind.ADAPTIVE_DELAY_COMPENSATION, CorrectionKind.GAP, CorrectionKind.DISCREPANCY)


class Correction(NamedTuple):
    """The scalars of a correction in a step, in double precision, in the order of ``Correction`` in ``csrc/update.h``.

    If steps are counted on the device, some of the scalars are tensors with a value for each parameter.

    The correction surrounds the update of ``Coefficients``; ``s`` are the weights that the gradient was computed with::

        g  = g + strength * g g (w - s)                                   delay compensation
        a  = (1 - mean_complement) a + mean_complement g g                adaptive delay compensation,
        g  = g + strength / sqrt(a + eps) * g g (w - s)                       both with the plain g
        G  = 1 + |w - s| / (sqrt(a * inv_bias) + eps)                     gap: g and decay are divided by G
        a  = (1 - mean_complement) a + mean_complement direction^2        gap, after the update; direction is the
                                                                              quotient that is taken from w
        a  = a + mean_complement * ((w' - w) - a)                         discrepancy, after the update
        x  = w' + (ahead_last * (w' - w) - ahead_momentum * m / D)
        x  = x + ahead_mean * a                                           discrepancy

    ``D`` is the denominator of ``direction``, 1 without a normaliser; with normalisation by sign, ``m / D`` is
    ``sign(m)``. The difference of two infinite weights of the same sign is 0. Master weights are compared after
    rounding to the parameter's dtype, so that the difference is 0 if there was no update in between.
    """

    strength: float = 0.0
    mean_complement: float = 0.0
    inv_bias: float = 1.0
    eps: float = 0.0
    ahead_last: float = 0.0
    ahead_momentum: float = 0.0
    ahead_mean: float = 0.0
