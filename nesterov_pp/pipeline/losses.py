"""Losses for the last stage of a pipeline."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor
from torch.nn import functional as F

IGNORED = -100


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
