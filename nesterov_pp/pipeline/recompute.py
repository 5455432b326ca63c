"""Activation recomputation on a stage whose weights change between forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Module):
    """A wrapper that keeps no activations of ``module``; backward runs it again with the same dropout.

    A module in a ``WeightStash`` also runs with the same weights: a backward binds the version of its forward.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.module(*inputs, **named)
        return checkpoint(self.module, *inputs, use_reentrant=False, **named)
