"""Older versions of weights as 8-bit differences between each version and the next: plain torch, C++ on the CPU, or
Triton on a GPU.

The format is that of ``csrc/cpu/differences.h``. In memory order, every ``GROUP`` elements of a tensor share a bfloat16
scale, and each has an int8 code::

    d = next - version,   s = bfloat16(max |d| / 127),   q = round(d / s)
    version = newest - (s q + s' q' + ...)                       the differences of all versions since, newest first

A row holds one difference of a whole list of tensors, 1.0625 bytes for each element.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from nesterov_pp.kernels import extension, triton_package

GROUP = 32
"""Elements that share a scale."""

_ALIGN = 64  # the codes of a tensor begin at a multiple of this
_LARGEST = 127.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of weights whose differences can be kept."""


def codes_of(count: int) -> int:
    """Return how many codes a row has for a tensor of ``count`` elements: rounded up to a multiple of 64."""
    return -(-count // _ALIGN) * _ALIGN


def places(tensors: Sequence[Tensor]) -> list[int]:
    """Return where the codes of each tensor begin in a row, and at last the length of the row."""
    found = [0]
    for t in tensors:
        found.append(found[-1] + codes_of(t.numel()))
    return found


def new_rows(tensors: Sequence[Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """Return zero codes, int8 of shape ``[rows, n]``, and scales, bfloat16 of shape ``[rows, n / 32]``."""
    device = tensors[0].device if tensors else torch.device("cpu")
    total = places(tensors)[-1]
    with torch.inference_mode(False):
        codes = torch.zeros(rows, total, dtype=torch.int8, device=device)
        return codes, torch.zeros(rows, total // GROUP, dtype=torch.bfloat16, device=device)


@torch.no_grad()
def encode(version: Sequence[Tensor], following: Sequence[Tensor], codes: Tensor, scales: Tensor, row: int) -> None:
    """Write the difference of two versions, lists of dense tensors that are laid out alike, to a row."""
    if _compiled(version):
        torch.ops.nesterov_pp.encode_differences(list(version), list(following), codes, scales, row)
        return
    if (triton := _triton(version)) is not None:
        triton.encode(version, following, codes[row], scales[row])
        return
    for before, after, q, s in zip(version, following, *_split(version, codes[row], scales[row]), strict=True):
        d = _padded(flat(after).float() - flat(before).float())
        largest = d.abs().amax(1)
        s.copy_(largest / torch.full_like(largest, _LARGEST))  # a GPU multiplies by the inverse of a number
        step = s.float()[:, None]
        usable = (step > 0.0) & (step < torch.inf)
        q.copy_(torch.where(usable, d / step, 0.0).clamp(-_LARGEST, _LARGEST).round())


@torch.no_grad()
def decode(newest: Sequence[Tensor], out: Sequence[Tensor], codes: Tensor, scales: Tensor, rows: Sequence[int]) -> None:
    """Write to ``out`` the version before the differences in ``rows``, newest first."""
    if _compiled(newest):
        torch.ops.nesterov_pp.decode_differences(list(newest), list(out), codes, scales, list(rows))
        return
    if (triton := _triton(newest)) is not None:
        triton.decode(newest, out, codes, scales, rows)
        return
    totals = [torch.zeros(codes_of(t.numel()) // GROUP, GROUP, device=t.device) for t in newest]
    for row in rows:
        for total, q, s in zip(totals, *_split(newest, codes[row], scales[row]), strict=True):
            total += q.float() * s.float()[:, None]
    for after, before, total in zip(newest, out, totals, strict=True):
        flat(before).copy_(flat(after).float() - total.flatten()[: after.numel()])


def flat(t: Tensor) -> Tensor:
    """Return the elements of a dense tensor in memory order, sharing its memory."""
    return torch.as_strided(t.detach(), (t.numel(),), (1,), t.storage_offset())


def _compiled(tensors: Sequence[Tensor]) -> bool:
    return extension.load()[0] is not None and all(t.is_cpu for t in tensors)


def _triton(tensors: Sequence[Tensor]) -> ModuleType | None:
    """Return the module of the Triton kernels if the tensors are on a GPU and Triton works."""
    on_gpu = bool(tensors) and all(t.is_cuda for t in tensors)
    return _triton_kernels() if on_gpu and why_not_triton(tensors[0].device) is None else None


@cache
def why_not_triton(device: torch.device) -> str | None:
    """Return why plain torch works on tensors of a device instead of Triton, as a sentence's end; None if Triton does.

    Triton compiles a kernel when it is first launched, and may find no C compiler then: so one is launched here, once.
    """
    kernels = _triton_kernels()
    if kernels is None:
        return "Triton cannot be imported"
    one = [torch.zeros(1, device=device)]
    codes, scales = new_rows(one, 1)
    try:
        kernels.encode(one, one, codes[0], scales[0])
    except Exception as error:  # Triton, its compilers and its drivers raise errors of many kinds
        reason = f"Triton cannot run its kernels ({(str(error) or type(error).__name__).splitlines()[0]})"
        warnings.warn(f"older versions are encoded by plain torch, which is slower: {reason}", RuntimeWarning, 2)
        return reason
    return None


@cache
def _triton_kernels() -> ModuleType | None:
    try:
        return triton_package.imported("differences")
    except ImportError:
        return None


def _padded(values: Tensor) -> Tensor:
    padding = codes_of(values.numel()) - values.numel()
    return torch.nn.functional.pad(values, (0, padding)).view(-1, GROUP)


def _split(tensors: Sequence[Tensor], codes: Tensor, scales: Tensor) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
    """Return the codes of each tensor, of shape ``[groups, 32]``, and its scales, of shape ``[groups]``."""
    sizes = [codes_of(t.numel()) for t in tensors]
    groups = [size // GROUP for size in sizes]
    return (q.view(-1, GROUP) for q in torch.split(codes, sizes)), iter(torch.split(scales, groups))
