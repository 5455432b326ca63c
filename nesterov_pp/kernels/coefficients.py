"""The scalars of one step, the only thing in which the optimizers of the family differ."""

from __future__ import annotations

from typing import NamedTuple


class Coefficients(NamedTuple):
    """Scalars of the update, in double precision, in the order of ``Coefficients`` in ``csrc/update.h``.

    With gradient ``g``, weights ``w`` and moments ``m`` and ``v``::

        g  = grad_scale * grad + l2 * w
        m  = m + beta1_complement * (g - m)
        v  = (1 - beta2_complement) * v + beta2_complement * g * g    adaptive rules only
        D  = sqrt(v * inv_bias2) + eps                                1 for the others
        w' = w - (decay * w + (c_grad * g + c_momentum * m) / D)

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
