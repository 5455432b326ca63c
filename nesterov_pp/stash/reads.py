"""Reads of weights that are decoded only once something reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_WRITTEN: tuple[Any, ...] = (Tensor.grad, Tensor.data)  # which say nothing of the values that were there
_NO_READS = {
    getattr(Tensor, name).__get__
    for name in ("grad", "requires_grad", "is_leaf", "grad_fn", "shape", "dtype", "device")
} | {attribute.__set__ for attribute in _WRITTEN}


class Waiting(Protocol):
    """Leaves whose values wait for a reader."""

    def waiting(self) -> Sequence[nn.Parameter]:
        """Return the leaves that do not have their values yet."""

    def read(self) -> None:
        """Give them their values."""


class ReadsOf(TorchFunctionMode):
    """Inside this block, a torch function that is called with a leaf that waits for its values gives them to it.

    Backward itself calls none in Python: only what runs in it does, such as a forward that runs again. torch functions
    run outside of all modes; so that it is seen, the functions that run a backward are run inside again.
    """

    def __init__(self, leaves: Waiting) -> None:
        super().__init__()
        self._leaves = leaves

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.autograd.backward:
            return self._backward(*args, **kwargs)
        if function is Tensor.backward:
            with self:
                return _backward_of(*args, **kwargs)
        if function is torch.autograd.grad:
            self._leaves.read()
        if function not in _NO_READS and (waiting := self._leaves.waiting()):
            own = set(map(id, waiting))
            if any(id(value) in own for value in tree_leaves((args, kwargs))):
                self._leaves.read()
        return function(*args, **kwargs)

    def _backward(
        self,
        tensors: Sequence[Tensor],
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """Do what ``torch.autograd.backward`` does once no torch function overrides it."""
        given = torch.autograd._tensor_or_tensors_to_tuple(grad_tensors, len(tensors))
        gradients = torch.autograd._make_grads(tensors, given, is_grads_batched=False)
        retain_graph = create_graph if retain_graph is None else retain_graph
        with self:
            torch.autograd.graph._engine_run_backward(
                tuple(tensors),
                gradients,
                retain_graph,
                create_graph,
                tuple(inputs or ()),
                allow_unreachable=True,
                accumulate_grad=True,
            )


def _backward_of(
    tensor: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)
