"""Memory for lists of tensors that a step passes over together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nesterov_pp.kernels import extension


def zeros_like(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Zeros of each tensor's shape, strides and device.

    Large lists on the CPU lie side by side in huge pages where the system has them to give; their storages cannot be
    resized.
    """
    module, _ = extension.load()
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
    if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__ or t.layout != torch.strided:
        return False
    return t.device.type == "cpu" and (t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t))
