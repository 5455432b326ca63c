"""What a loss function may return: a mean over the microbatch, or a sum and its weight.

[note: means over microbatches of unequal weight]
An update's gradient is that of the mean over all its microbatches. If these have unequal numbers of valid tokens, the
mean of their means is another number. So a loss function may return ``(sum, weight)``, for example the sum over valid
tokens and how many there are. Backward then differentiates the sums, and the gradients are divided by the weights of
the whole update. A method divides the gradients by the number of microbatches, K, so what is left to do is to multiply
them by K over the sum of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

LossFunction = Callable[[Any, Any], "Tensor | tuple[Tensor, float | Tensor]"]
"""``(output of the last stage, targets) -> loss``: a 0-d tensor, the mean over the microbatch; or ``(sum, weight)``."""


class Loss(NamedTuple):
    """A microbatch's loss: what backward differentiates, and its weight if that is a sum."""

    tensor: Tensor
    weight: float | None

    @property
    def mean(self) -> Tensor:
        """The mean over the microbatch, a 0-d tensor; 0 if the weight is."""
        return self.tensor if not self.weight else self.tensor / self.weight


def loss_of(found: Any) -> Loss:
    """Return what a loss function has returned, checked.

    Raises:
        ValueError: it is neither a 0-d tensor nor a pair of one and a weight of at least 0.
    """
    tensor, weight = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(tensor, Tensor) or tensor.numel() != 1:
        what = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"loss_fn must return a 0-d tensor (a mean), or such a sum and its weight, not {what}")
    tensor = tensor.reshape(())
    if weight is None:
        return Loss(tensor, None)
    number = float(weight)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"the weight that loss_fn returns must be a finite number of at least 0, not {number}")
    return Loss(tensor, number)


def weight_of_update(weights: Iterable[float | None]) -> float | None:
    """Return the sum of the weights of an update's microbatches; None if they have none.

    Raises:
        ValueError: only some microbatches have a weight.
    """
    every = list(weights)
    given = [weight for weight in every if weight is not None]
    if given and len(given) != len(every):
        raise ValueError("loss_fn must return a weight for every microbatch of an update, or for none")
    return math.fsum(given) if given else None


def reweigh(parameters: Iterable[Tensor], microbatches: int, weight: float | None) -> None:
    """Turn gradients that a step divides by ``microbatches`` into such that it divides by ``weight``.

    Without weight at all, the gradients are those of no token: zeros, which stay so.
    """
    if not weight:
        return
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(microbatches / weight)
