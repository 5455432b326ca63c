"""Losses: what a loss function may return, and one for causal language models.

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
from typing import Any, Literal, NamedTuple, overload

from torch import Tensor
from torch.nn import functional as F

IGNORED = -100

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


@overload
def causal_lm_loss(
    logits: Tensor, labels: Tensor, *, ignore_index: int = ..., reduction: Literal["mean"] = ...
) -> Tensor: ...
@overload
def causal_lm_loss(
    logits: Tensor, labels: Tensor, *, ignore_index: int = ..., reduction: Literal["sum"]
) -> tuple[Tensor, Tensor]: ...
def causal_lm_loss(
    logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORED, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the cross entropy of predicting each token from those before it, as causal models of transformers do.

    Args:
        logits: of shape (..., T, V); converted to float32.
        labels: the tokens themselves, integers of shape (..., T): position t of ``logits`` predicts ``labels`` t + 1.
        ignore_index: labels with this value are not predicted (default: -100).
        reduction: "mean" over the predicted tokens (default; 0 if there are none); "sum", which also returns their
            number, a 0-d float32 tensor, so that microbatches with different numbers of tokens can be averaged exactly.

    Raises:
        ValueError: the shapes do not fit, or ``reduction`` is neither of the two.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels need one token for each position of the logits, a shape of {tuple(logits.shape[:-1])}, not "
            f"{tuple(labels.shape)}"
        )
    # Shifting the labels copies less than shifting the logits.
    targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].reshape(-1)
    total = F.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), targets, ignore_index=ignore_index, reduction="sum"
    )
    weight = (targets != ignore_index).sum().float()
    return (total, weight) if reduction == "sum" else total / weight.clamp(min=1.0)
