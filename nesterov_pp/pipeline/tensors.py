"""The values that stages exchange: nests of tensors, tuples, lists, dicts, None and other plain values.

``torch.utils._pytree`` knows the containers, also those that other libraries register with it, such as the outputs of
transformers' models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer; the CPU if it has none."""
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in a nest, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def map_tensors(act: Callable[[Tensor], Any], value: Any) -> Any:
    """Return the nest with ``act`` applied to its tensors."""
    if isinstance(value, Tensor):
        return act(value)
    return tree_map(lambda leaf: act(leaf) if isinstance(leaf, Tensor) else leaf, value)


def to_device(value: Any, device: torch.device | str) -> Any:
    """Return ``value`` with its tensors moved to ``device``. A mapping of another kind becomes a dict."""
    if isinstance(value, Mapping) and not isinstance(value, dict):
        value = dict(value)
    return map_tensors(lambda tensor: tensor.to(device), value)


def is_finite(value: Any) -> bool:
    """Return whether no tensor of ``value`` contains a NaN or Inf. On a GPU this waits for the device."""
    for tensor in tensors_of(value):
        if not tensor.is_floating_point():
            continue
        # A finite sum has finite terms; only a sum that is not finite needs a closer look.
        total = tensor.detach().sum(dtype=torch.float32)
        if not torch.isfinite(total) and not torch.isfinite(tensor).all():
            return False
    return True


class _Inlet(torch.autograd.Function):
    """The identity. Its output is no view of a leaf, so that a module may change it in place."""

    @staticmethod
    def forward(_: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient


def as_inputs(value: Any) -> tuple[Any, list[Tensor]]:
    """Return a received nest as inputs of a module, and the leaves that collect the gradients of these inputs.

    A leaf is a tensor that requires gradients.
    """
    leaves = [tensor for tensor in tensors_of(value) if tensor.requires_grad]
    if not leaves or not torch.is_grad_enabled():
        return value, leaves
    inlet: Callable[[Tensor], Tensor] = _Inlet.apply
    return map_tensors(lambda tensor: inlet(tensor) if tensor.requires_grad else tensor, value), leaves
