"""The forwards and backwards of one stage, and what it keeps of a microbatch in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nesterov_pp.pipeline.stage import run_stage
from nesterov_pp.pipeline.tensors import as_inputs, tensors_of


class _Flight(NamedTuple):
    """A microbatch between its forward and its backward."""

    leaves: list[Tensor]
    """The received tensors that require gradients."""

    roots: list[Tensor]
    """The tensors handed on that require gradients."""


class Engine:
    """The microbatches in flight on a stage.

    Every message is received into its own memory, because autograd may keep a received gradient, or a view of it, as a
    parameter's gradient.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._flying: dict[int, _Flight] = {}

    def forward(self, microbatch: int, inputs: Any) -> Any:
        """Return the stage's output."""
        inputs, leaves = as_inputs(inputs)
        output = run_stage(self._module, inputs)
        self._flying[microbatch] = _Flight(leaves, [t for t in tensors_of(output) if t.requires_grad])
        return output

    def roots(self, microbatch: int) -> list[Tensor]:
        """Return the tensors for which the next stage sends gradients back for a microbatch."""
        return self._flying[microbatch].roots

    def backward(self, microbatch: int, loss: Tensor | None, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Differentiate a microbatch from its loss, or from the gradients of its outputs.

        Returns:
            The gradients to send back, one for each received tensor that requires one.
        """
        leaves, roots = self._flying.pop(microbatch)
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]
        elif roots:
            torch.autograd.backward(roots, gradients)
        return [torch.zeros_like(t) if t.grad is None else t.grad.contiguous() for t in leaves]
