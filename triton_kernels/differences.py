"""The launches of the kernels that keep older versions of weights as 8-bit differences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_pp.kernels.differences import codes_of

from . import difference_kernels as kernels

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTERPRETED = bool(triton.knobs.runtime.interpret)
BLOCK, WARPS = (4096 if INTERPRETED else 512), 2  # the interpreter takes as long for many elements as for few


class _Launch(NamedTuple):
    """What a kernel reads to find the tensors of one dtype."""

    dtype: torch.dtype
    table: Tensor
    chunks: Tensor


def encode(version: Sequence[Tensor], following: Sequence[Tensor], codes: Tensor, scales: Tensor) -> None:
    """Write the difference of two versions to a row of codes and scales."""
    with torch.cuda.device_of(codes):  # type: ignore[no-untyped-call] # Triton launches on the current device
        for launch in _launches(version, following, codes):
            kernels.encode_kernel[(launch.chunks.numel(),)](
                launch.table,
                launch.chunks,
                codes,
                scales,
                S=_DTYPES[launch.dtype],
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )


def decode(newest: Sequence[Tensor], out: Sequence[Tensor], codes: Tensor, scales: Tensor, rows: Sequence[int]) -> None:
    """Write the version before the differences in ``rows``, newest first."""
    with torch.cuda.device_of(codes):  # type: ignore[no-untyped-call]
        for launch in _launches(newest, out, codes):
            kernels.decode_kernel[(launch.chunks.numel(),)](
                launch.table,
                launch.chunks,
                codes,
                scales,
                _sent(tuple(rows), codes.device),
                len(rows),
                codes.stride(0),
                S=_DTYPES[launch.dtype],
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )


def _launches(a: Sequence[Tensor], b: Sequence[Tensor], codes: Tensor) -> list[_Launch]:
    words: dict[torch.dtype, list[int]] = {}
    place = 0
    for first, second in zip(a, b, strict=True):
        if first.numel() > 0:
            addresses = first.data_ptr(), second.data_ptr()
            aligned = (addresses[0] | addresses[1] | codes.data_ptr()) % 16 == 0
            words.setdefault(first.dtype, []).extend((*addresses, first.numel(), place, int(aligned)))
        place += codes_of(first.numel())
    return [
        _Launch(dtype, _sent(tuple(table), codes.device), _chunks(tuple(table[2 :: kernels.WORDS]), codes.device))
        for dtype, table in words.items()
    ]


@lru_cache(maxsize=32)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the chunks of tensors of these sizes, one word for each: (tensor << 32) | chunk of that tensor."""
    words = [i << 32 | k for i, size in enumerate(sizes) for k in range(-(-size // kernels.CHUNK))]
    return torch.tensor(words, dtype=torch.int64, device=device)


@lru_cache(maxsize=1024)
def _sent(words: tuple[int, ...], device: torch.device) -> Tensor:
    """Return integers on a device. A ring has the same few lists again and again, so they stay there."""
    host = torch.tensor(words, dtype=torch.int64, device="cpu")
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
