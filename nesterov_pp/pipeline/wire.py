"""Activations and gradients in fewer bits on their way between stages.

"bfloat16" rounds to the nearest bfloat16. "int8" takes groups of 32 consecutive numbers x and sends
``round(127 x / max |x|)`` in 8 bits and ``max |x| / 127`` in float32: 9 bits a number, with an error of at most 1/254
of the largest number of the group. Tensors that carry no gradients, such as masks and positions, are sent as they are.

Errors are not fed back: what is left of one microbatch's gradients belongs to other inputs than those of the next, and
in 8 bits adding it makes the gradients of the weights worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from nesterov_pp.pipeline.tensors import map_tensors

Wire = Literal["bfloat16", "int8"]
_BYTES: dict[str, int] = {"bfloat16": 2, "int8": 1}
GROUP, _LARGEST = 32, 127


def check_wire(wire: str | None) -> None:
    """Raise ValueError if ``wire`` is neither None nor a known format."""
    if wire is not None and wire not in _BYTES:
        raise ValueError(f'wire must be "bfloat16", "int8" or None, not {wire!r}')


def is_coded(dtype: torch.dtype, wire: str | None) -> bool:
    """Return whether tensors of a dtype become smaller."""
    return wire is not None and dtype.is_floating_point and dtype.itemsize > _BYTES[wire]


def message_bytes(size: int, dtype: torch.dtype, wire: str | None) -> int:
    """Return the bytes that ``size`` bytes of a dtype take on the wire."""
    if wire is None or not is_coded(dtype, wire):
        return size
    count = size // dtype.itemsize
    return 2 * count if wire == "bfloat16" else count + 4 * -(-count // GROUP)


def encode(tensor: Tensor, wire: str) -> list[Tensor]:
    """Return the tensors that are sent for one of any shape."""
    tensor = tensor.detach()
    if wire == "bfloat16":
        return [tensor.to(torch.bfloat16)]
    flat = tensor.reshape(-1).float()
    groups = F.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)
    scales = groups.abs().amax(1) / _LARGEST
    units = torch.where(scales > 0, scales, 1.0).unsqueeze(1)
    codes = (groups / units).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
    return [codes.view(-1)[: flat.numel()], scales]


def decode(parts: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the tensor that ``encode`` was given, as far as its code tells, in memory of its own."""
    if len(parts) == 1:
        return parts[0].to(dtype)
    codes, scales = parts
    units = scales.repeat_interleave(GROUP)[: codes.numel()]
    return codes.view(shape).float().mul_(units.view(shape)).to(dtype)


def memory_like(tensor: Tensor, wire: str | None) -> list[Tensor]:
    """Return memory for what is sent for a tensor."""
    if wire is None or not is_coded(tensor.dtype, wire):
        return [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)]
    if wire == "bfloat16":
        return [torch.empty(tensor.shape, dtype=torch.bfloat16, device=tensor.device)]
    count = tensor.numel()
    return [
        torch.empty(count, dtype=torch.int8, device=tensor.device),
        torch.empty(-(-count // GROUP), dtype=torch.float32, device=tensor.device),
    ]


@dataclass(frozen=True)
class _Place:
    """A place for a coded tensor in a nest."""

    shape: torch.Size
    dtype: torch.dtype
    parts: int


def pack(value: Any, wire: str | None) -> Any:
    """Return a nest to send for a stage's output."""
    if wire is None:
        return value
    parts: list[Tensor] = []

    def place(tensor: Tensor) -> Any:
        if not (tensor.requires_grad and is_coded(tensor.dtype, wire)):
            return tensor
        own = encode(tensor, wire)
        parts.extend(own)
        return _Place(tensor.shape, tensor.dtype, len(own))

    return map_tensors(place, value), parts


def unpack(value: Any, wire: str | None) -> Any:
    """Return the next stage's input from the nest that ``pack`` has made."""
    if wire is None:
        return value
    nest, parts = value
    left = iter(parts)

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, _Place):
            return leaf
        return decode([next(left) for _ in range(leaf.parts)], leaf.shape, leaf.dtype).requires_grad_()

    return tree_map(fill, nest)


def pack_gradients(gradients: Sequence[Tensor], wire: str | None) -> list[Tensor]:
    """Return the tensors to send for gradients."""
    if wire is None:
        return list(gradients)
    return [part for g in gradients for part in (encode(g, wire) if is_coded(g.dtype, wire) else [g])]


def unpack_gradients(parts: Sequence[Tensor], roots: Sequence[Tensor], wire: str | None) -> list[Tensor]:
    """Return the gradients of ``roots`` from what ``pack_gradients`` has made."""
    if wire is None:
        return list(parts)
    left = iter(parts)
    return [
        decode([next(left) for _ in range(1 if wire == "bfloat16" else 2)], root.shape, root.dtype)
        if is_coded(root.dtype, wire)
        else next(left)
        for root in roots
    ]


class _Boundary(torch.autograd.Function):
    """What the next stage receives of a tensor, and the stage itself of its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, wire: str) -> Tensor:
        ctx.wire = wire
        return decode(encode(tensor, wire), tensor.shape, tensor.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return decode(encode(gradient, ctx.wire), gradient.shape, gradient.dtype), None


def across(value: Any, wire: str | None) -> Any:
    """Return a stage's output as the next stage receives it, differentiable as the processes of a pipeline do it."""
    if wire is None:
        return value

    def cross(tensor: Tensor) -> Any:
        if not (tensor.requires_grad and is_coded(tensor.dtype, wire)):
            return tensor
        return _Boundary.apply(tensor, wire)  # type: ignore[no-untyped-call]

    return map_tensors(cross, value)
