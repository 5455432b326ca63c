"""Clipping by the norm of the whole pipeline's gradient, without waiting for it.

[note: which norms a stage knows]
When a stage steps update ``t``, the later stages have finished the backward of the same microbatches, so their norms
come with the gradients, in time. The earlier stages have not: their norms come with the activations, from the update
that wrote the weights that those were computed with. On stage ``j`` with delay ``tau_j``, that is update
``t - tau_j - 1``. So the stages of one update may clip by different norms, but every run clips by the same ones. Before
its first update, a stage counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nesterov_pp.optim.local import is_dtensor

ClipOver = Literal["stage", "pipeline"]
"""Whose gradients' norm is clipped: that of each stage, or that of all stages."""


def check_clip_over(clip_over: str, max_grad_norm: float | None) -> bool:
    """Return whether to clip by the norm of the whole pipeline.

    Raises:
        ValueError: ``clip_over`` is no such choice, or there is no norm to clip to.
    """
    if clip_over not in ("stage", "pipeline"):
        raise ValueError(f"clip_over must be 'stage' or 'pipeline', not {clip_over!r}")
    if clip_over == "pipeline" and (max_grad_norm is None or not max_grad_norm > 0.0):
        raise ValueError(f"clip_over='pipeline' needs a max_grad_norm above 0, not {max_grad_norm}")
    return clip_over == "pipeline"


class Norms:
    """The squared gradient norms of one stage's last updates, by the version of the weights that each update wrote."""

    def __init__(self, versions: int) -> None:
        self._versions = versions
        self._squares: dict[int, float] = {}

    def note(self, version: int, square: float) -> None:
        """Record the norm of the update that writes ``version``."""
        self._squares[version] = square
        for gone in [v for v in self._squares if v <= version - self._versions]:
            del self._squares[gone]

    def of(self, version: int) -> float:
        """Return the squared norm of the update that wrote ``version``; 0 for the weights of the start."""
        return self._squares.get(version, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the norms that microbatches in flight need."""
        return {"squares": dict(self._squares)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._squares = dict(state["squares"])


def squared_norm(parameters: Iterable[Tensor], microbatches: int) -> float:
    """Return the squared norm of the gradients' mean over microbatches.

    Raises:
        ValueError: a gradient is sharded.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if any(map(is_dtensor, grads)):
        raise ValueError("clip_over='pipeline' takes no sharded gradients; use clip_over='stage'")
    if not grads:
        return 0.0
    return (float(torch.nn.utils.get_total_norm(grads)) / microbatches) ** 2


def clip(parameters: Sequence[Tensor], square: float, max_grad_norm: float) -> None:
    """Multiply the gradients by ``min(1, max_grad_norm / (norm + 1e-6))``, as ``clip_grad_norm_`` does."""
    factor = max_grad_norm / (math.sqrt(square) + 1e-6)
    if factor >= 1.0:
        return
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(factor)
