"""Backward with other weights than those that autograd has saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def check_linearisable(leaves: Sequence[Tensor], linearise_at: str, gathered: bool) -> None:
    """Raise ValueError if autocast or tensor parallelism would hide the weights of a forward, its ``leaves``.

    ``gathered``: whether ``fully_shard`` keeps some of the leaves.
    """
    if not gathered and any(hasattr(leaf, "to_local") for leaf in leaves):
        raise ValueError(f'linearise_at="{linearise_at}" cannot follow DTensor weights; use linearise_at="version"')
    device_types = {leaf.device.type for leaf in leaves}
    if any(torch.is_autocast_enabled(kind) for kind in device_types):
        raise ValueError(
            f'linearise_at="{linearise_at}" cannot see through the weight copies that autocast makes; '
            'turn autocast off in this stage or use linearise_at="version"'
        )


def saved_elsewhere(
    places: Sequence[Sequence[Tensor]], elsewhere: Callable[[int], Tensor]
) -> AbstractContextManager[Any]:
    """Return hooks that swap the weights autograd saves, and views of them, for other weights when backward runs.

    Args:
        places: lists of the parameters; the weights of the forward lie in the memory of one of the lists.
        elsewhere: function that returns the weight to use instead of one of them, called when backward runs.
    """
    # Weights that fully_shard keeps are gathered again for the backward, as the newest weights.
    owner = {
        leaf.untyped_storage().data_ptr(): (i, leaf.storage_offset())
        for leaves in places
        for i, leaf in enumerate(leaves)
        if leaf.numel() and not hasattr(leaf, "to_local")
    }

    def pack(saved: Tensor) -> Any:
        found = owner.get(saved.untyped_storage().data_ptr()) if saved.layout == torch.strided else None
        if found is None:
            return saved
        return found[0], saved.shape, saved.stride(), saved.storage_offset() - found[1]

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        i, shape, stride, offset = packed
        current = elsewhere(i).detach()
        offset += int(current.storage_offset())
        return torch.as_strided(current, shape, stride, offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
