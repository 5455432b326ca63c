"""Memory for lists of tensors that a step passes over together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nesterov_pp.kernels import extension
from nesterov_pp.kernels.raw import in_fake_mode, why_not_raw


def zeros_like(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Return zeros with the shape, strides and device of each tensor.

    Large lists on the CPU lie side by side in huge pages if the system provides them; their storages cannot be resized.
    The zeros can be written outside inference mode, even if they were created inside it.
    """
    with torch.inference_mode(False):
        return _zeros_like(tensors, dtypes)


def _zeros_like(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    module = None if in_fake_mode() else extension.load()[0]
    together = [module is not None and _is_packable(t) for t in tensors]
    packed: dict[torch.dtype, Iterator[Tensor]] = {}
    if module is not None:
        for dtype in set(dtypes):
            chosen = [t for t, d, packs in zip(tensors, dtypes, together, strict=True) if packs and d == dtype]
            packed[dtype] = iter(module.zeros_like(chosen, dtype))
    return [
        next(packed[dtype])
        if packs
        else torch.zeros_like(t, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
        for t, dtype, packs in zip(tensors, dtypes, together, strict=True)
    ]


def _is_packable(t: Tensor) -> bool:
    if t.layout != torch.strided or t.device.type != "cpu" or why_not_raw(t) is not None:
        return False
    return t.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(t))
