"""The leaf tensors of a ring, and where a module keeps its own."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from nesterov_pp.kernels import zeros_like


def gathers_itself(module: nn.Module) -> bool:
    """Whether FSDP2 (``fully_shard``) keeps weights of the module, and binds gathered ones when it runs."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # takes long to import, and is there if it has been used
    return fsdp is not None and any(isinstance(part, fsdp.FSDPModule) for part in module.modules())


def check_stashable(named: dict[str, nn.Parameter]) -> None:
    """Raises: ValueError: one of them cannot be kept in a ring."""
    first_with: dict[int, str] = {}
    for name, p in named.items():
        dense = p.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(p)
        if p.layout != torch.strided or not dense:
            raise ValueError(f"{name} is not a dense strided tensor, so it cannot be kept in a WeightStash")
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name} carries hooks, which the other versions would not have; "
                "register them after building the WeightStash, on each of stash.parameters(version)"
            )
        here = p.to_local() if hasattr(p, "to_local") else p  # of a DTensor, the shard
        twin = first_with.setdefault(here.untyped_storage().data_ptr(), name) if here.numel() else name
        if twin != name:
            raise ValueError(
                f"{name} shares memory with {twin}; tie them by using one Parameter in both places, "
                "or give each its own memory"
            )


def new_leaves(first: list[nn.Parameter]) -> list[nn.Parameter]:
    """Zeros, each laid out in memory as its parameter, with the parameter's attributes."""
    leaves = []
    for p, zeros in zip(first, zeros_like(first, [p.dtype for p in first]), strict=True):
        leaf = nn.Parameter(zeros)
        leaf.__dict__.update(p.__dict__)
        leaves.append(leaf)
    return leaves


def places_of(module: nn.Module, index: dict[int, int]) -> list[tuple[Any, Any, int]]:
    """Where the module keeps its parameters: (container, key, parameter index), tied ones in several places."""
    places: list[tuple[Any, Any, int]] = []
    for submodule in module.modules():
        for key, p in submodule._parameters.items():
            if p is not None and id(p) in index:
                places.append((submodule._parameters, key, index[id(p)]))
        # Recurrent layers read their weights from a list of their own.
        if isinstance(submodule, nn.RNNBase):
            for k, p in enumerate(submodule._flat_weights):
                if p is not None and id(p) in index:
                    places.append((submodule._flat_weights, k, index[id(p)]))
    return places
