"""State in eight bits: the entries of a parameter's state that hold codes, and their conversion from and to float32.

The codes of a moment are the entry of that name; ``exp_avg_scale`` and ``exp_avg_sq_scale`` hold the scales.
``master_residual`` completes bfloat16 weights to 24 bits. ``kernels/codes.py`` describes the codes.

The groups of a ``DTensor`` are those of its shards. Its scales are a ``DTensor`` of shape ``[shards, n]``, with a row
for each shard and ``n`` enough for the largest one. So a checkpoint holds the scales of all shards, and another number
of shards does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nesterov_pp.kernels.codes import (
    Coded,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
    group_count,
    joined,
    root,
    split,
)
from nesterov_pp.optim.local import is_dtensor, local

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

SCALE_OF = {"exp_avg": "exp_avg_scale", "exp_avg_sq": "exp_avg_sq_scale"}
CODES = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
RESIDUAL = "master_residual"


def is_coded(entries: Mapping[str, Any]) -> bool:
    """Return whether the moments of a parameter's state are in eight bits."""
    first = entries.get("exp_avg")
    return isinstance(first, Tensor) and first.dtype == torch.int8


def fresh_scales(p: Tensor) -> Tensor:
    """Return the scales of a moment that is 0."""
    if not is_dtensor(p):
        return torch.zeros(group_count(p.numel()), dtype=torch.float16, device=p.device)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    shards, groups = _shards(p)
    own = torch.zeros(1, groups, dtype=torch.float16, device=local(p).device)
    placements = [Replicate() if placement.is_replicate() else Shard(0) for placement in p.placements]
    return DTensor.from_local(
        own, p.device_mesh, placements, run_check=False, shape=torch.Size((shards, groups)), stride=(groups, 1)
    )


def local_scales(scales: Tensor, p: Tensor) -> Tensor:
    """Return the scales of the elements of a parameter in this process, sharing their memory."""
    return local(scales).view(-1)[: group_count(local(p).numel())] if is_dtensor(scales) else scales


def _shards(p: DTensor) -> tuple[int, int]:
    """Return how many shards a parameter has, and how many groups its largest one."""
    sizes, shards = list(p.shape), 1
    for count, placement in zip(p.device_mesh.shape, p.placements, strict=True):
        if not placement.is_replicate():
            dim = placement.dim  # type: ignore[attr-defined]
            sizes[dim] = -(-sizes[dim] // count)
            shards *= count
    return shards, group_count(math.prod(sizes))


def check_saved(what: str, name: str, entries: Mapping[str, Any], p: Tensor) -> None:
    """Refuse saved codes without the scales that go with them.

    Raises:
        ValueError: the scales are missing, or of another dtype or number, or those of other shards.
    """
    scales = entries.get(SCALE_OF[name])
    known = isinstance(scales, Tensor) and scales.dtype == torch.float16
    if is_dtensor(p):
        shards, groups = _shards(p)
        if not known or not is_dtensor(scales) or scales.shape != (shards, groups):
            raise ValueError(
                f"{what} is in eight bits and needs the scales of {shards} shards of up to {groups} groups; for "
                "another number of shards, save what widened_state_dict() returns"
            )
        codes = entries[name]
        if not is_dtensor(codes) or tuple(codes.placements) != tuple(p.placements):
            placed = tuple(codes.placements) if is_dtensor(codes) else "no DTensor"
            raise ValueError(
                f"{what} is in eight bits and placed as {placed}, but its parameter as {tuple(p.placements)}; for "
                "another placement, save what widened_state_dict() returns"
            )
        return
    count = group_count(p.numel())
    if not known or scales is None or scales.shape != (count,):
        raise ValueError(f"{what} is in eight bits and needs {count} float16 scales, one for 32 elements")


@torch.no_grad()
def encode_entries(entries: dict[str, Any], p: Tensor) -> None:
    """Put the moments of a loaded state in eight bits, in groups along the parameter's memory."""
    for name, scale_name in SCALE_OF.items():
        value = entries.get(name)
        if not isinstance(value, Tensor):
            continue
        laid_out = torch.empty_like(p, dtype=CODES[name], memory_format=torch.preserve_format, requires_grad=False)
        if value.dtype == CODES[name] and value.stride() == laid_out.stride():
            continue
        wide = _widened(entries, name, p) if value.dtype == CODES[name] else _placed_as(p, value)
        values = torch.empty_like(local(laid_out), dtype=torch.float32).copy_(wide)
        codes, scales = encode_first(values) if name == "exp_avg" else encode_second(root(values))
        local(laid_out).copy_(codes)
        entries[name], entries[scale_name] = laid_out, fresh_scales(p)
        local_scales(entries[scale_name], p).copy_(scales)


@torch.no_grad()
def widened_entries(entries: Mapping[str, Any], p: Tensor) -> dict[str, Any]:
    """Return a parameter's state with float32 moments and a float32 master weight in place of codes."""
    wide = dict(entries)
    if is_coded(entries):
        for name in CODES.keys() & entries.keys():
            wide[name] = _as_shard_of(p, _widened(entries, name, p))
            del wide[SCALE_OF[name]]
    if RESIDUAL in wide:
        wide["master_weight"] = _as_shard_of(p, joined(local(p).detach(), local(wide.pop(RESIDUAL))))
    return wide


def residual_of(master: Tensor) -> Tensor:
    """Return the residual of a float32 master weight."""
    return _as_shard_of(master, split(local(master))[1])


def _widened(entries: Mapping[str, Any], name: str, p: Tensor) -> Tensor:
    """Return the float32 values of a moment in this process."""
    coded = Coded(local(entries[name]), local_scales(entries[SCALE_OF[name]], p))
    return decode_first(coded) if name == "exp_avg" else decode_second(coded)


def _placed_as(p: Tensor, value: Tensor) -> Tensor:
    """Return the elements of a tensor that are those of a parameter in this process."""
    if is_dtensor(p) and is_dtensor(value):
        return local(value.redistribute(placements=p.placements))
    return value


def _as_shard_of(p: Tensor, values: Tensor) -> Tensor:
    """Return values of this process as a tensor that is placed like a parameter."""
    if not is_dtensor(p):
        return values
    whole = torch.empty_like(p, dtype=values.dtype, requires_grad=False)
    local(whole).copy_(values)
    return whole
