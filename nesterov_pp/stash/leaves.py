"""The leaf tensors of a ring, and checks of the parameters that a module has."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from nesterov_pp.kernels import zeros_like


def gathers_itself(module: nn.Module) -> bool:
    """Return whether FSDP2 (``fully_shard``) keeps weights of the module, and binds gathered ones when it runs."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and already imported if it has been used
    return fsdp is not None and any(isinstance(part, fsdp.FSDPModule) for part in module.modules())


def check_stashable(named: dict[str, nn.Parameter]) -> None:
    """Raise ValueError if one of the parameters cannot be kept in a ring."""
    first_with: dict[int, str] = {}
    for name, p in named.items():
        _check_memory(name, p)
        dense = p.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(p)
        if p.layout != torch.strided or not dense:
            raise ValueError(f"{name} is not a dense strided tensor, so it cannot be kept in a WeightStash")
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name} carries hooks, which the other versions would not have; "
                "register them after building the WeightStash, on each of stash.parameters(version)"
            )
        here = p.to_local() if hasattr(p, "to_local") else p  # the shard of a DTensor
        twin = first_with.setdefault(here.untyped_storage().data_ptr(), name) if here.numel() else name
        if twin != name:
            raise ValueError(
                f"{name} shares memory with {twin}; tie them by using one Parameter in both places, "
                "or give each its own memory"
            )


def _check_memory(name: str, p: nn.Parameter) -> None:
    fake = sys.modules.get("torch._subclasses.fake_tensor")  # already imported if it has been used
    if is_lazy(p):
        cause = "not initialised yet, because its module is lazy until its first forward; run a forward"
    elif fake is not None and isinstance(p, fake.FakeTensor):
        cause = "a FakeTensor, which has no values; build the module outside of FakeTensorMode"
    elif p.is_meta:
        cause = (
            "on the meta device, where there are no values; materialise the module with to_empty(), load its weights"
        )
    elif p.numel() and p.layout == torch.strided and not _storage(p).nbytes():
        cause = "without memory, because its storage was resized to nothing; restore the storage"
    else:
        return
    raise ValueError(f"{name} is {cause}, then build the WeightStash")


def _storage(p: nn.Parameter) -> torch.UntypedStorage:
    """Return the storage of a parameter, or of its shard if it is a DTensor."""
    here: torch.Tensor = p.to_local() if hasattr(p, "to_local") else p
    return here.untyped_storage()


def new_leaves(first: list[nn.Parameter]) -> list[nn.Parameter]:
    """Return zeros, each laid out in memory like its parameter, with the parameter's attributes."""
    leaves = []
    for p, zeros in zip(first, zeros_like(first, [p.dtype for p in first]), strict=True):
        leaf = nn.Parameter(zeros)
        leaf.__dict__.update(p.__dict__)
        leaves.append(leaf)
    return leaves


def aliases(first: list[nn.Parameter]) -> list[nn.Parameter]:
    """Return leaves of their own with the memory, the version counters and the attributes of these parameters."""
    leaves = []
    for p in first:
        leaf = nn.Parameter(p.detach())
        leaf.__dict__.update(p.__dict__)
        leaves.append(leaf)
    return leaves
