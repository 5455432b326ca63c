"""Linearisation at other weights than those of the forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def linearised_elsewhere(
    leaves: Sequence[Tensor], elsewhere: Callable[[], Sequence[Tensor]], *, linearise_at: str, gathered: bool
) -> AbstractContextManager[Any]:
    """Return hooks that swap the weights autograd saves, and views of them, for other weights when backward runs.

    Args:
        leaves: the weights of the forward.
        elsewhere: function that returns the weights to use instead, called when backward runs.
        linearise_at: the value to show in error messages.
        gathered: whether ``fully_shard`` keeps some of the leaves.

    Raises:
        ValueError: autocast or tensor parallelism would hide the weights.
    """
    if not gathered and any(hasattr(leaf, "to_local") for leaf in leaves):
        raise ValueError(f'linearise_at="{linearise_at}" cannot follow DTensor weights; use linearise_at="version"')
    device_types = {leaf.device.type for leaf in leaves}
    if any(torch.is_autocast_enabled(kind) for kind in device_types):
        raise ValueError(
            f'linearise_at="{linearise_at}" cannot see through the weight copies that autocast makes; '
            'turn autocast off in this stage or use linearise_at="version"'
        )
    # Weights that fully_shard keeps are gathered again for the backward, as the newest weights.
    plain = [(i, leaf) for i, leaf in enumerate(leaves) if leaf.numel() and not hasattr(leaf, "to_local")]
    owner = {leaf.untyped_storage().data_ptr(): i for i, leaf in plain}

    def pack(saved: Tensor) -> Any:
        i = owner.get(saved.untyped_storage().data_ptr()) if saved.layout == torch.strided else None
        if i is None:
            return saved
        return i, saved.shape, saved.stride(), saved.storage_offset() - leaves[i].storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        i, shape, stride, offset = packed
        current = elsewhere()[i].detach()
        offset += int(current.storage_offset())
        return torch.as_strided(current, shape, stride, offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
