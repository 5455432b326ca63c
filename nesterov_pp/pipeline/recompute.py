"""Activation recomputation on a stage whose weights change between forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nesterov_pp.stash import WeightStash


class Recomputed(nn.Module):
    """Runs ``module`` without keeping its activations; backward runs it again with the same weights and dropout.

    The weights are those of the ring's version that is in use at the forward.
    """

    def __init__(self, module: nn.Module, stash: WeightStash) -> None:
        super().__init__()
        self.module, self._stash = module, stash

    def forward(self, *inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.module(*inputs)
        stash = self._stash
        version = stash.in_use

        def run(*again: Any) -> Any:
            with stash.use(version):
                output = self.module(*again)
            stash.release(version)
            return output

        return checkpoint(run, *inputs, use_reentrant=False)
