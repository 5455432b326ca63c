"""Moments in eight bits and weights in twenty-four, in plain torch: what ``csrc/codes.h`` does in registers.

Moments are coded in groups of 32 elements in memory order, each with a float16 scale ``s``, the largest ``|m|`` or
``sqrt(v)`` of the group; a tensor's last group may be shorter::

    m = s q / (254 - |q|)      q in -127 .. 127:  companding f(x) = 2 x / (1 + |x|) of x = m / s, times 127
    v = (q s / 255)^2          q in 0 .. 255

``m`` is rounded to the nearest code. ``sqrt(v)`` is rounded up or down at random so that it is right on average: a
step with beta2 = 0.999 changes it by less than half a code, which rounding to nearest would lose every time. A code of
0 means that ``v`` is exactly 0. A group with an element that is not finite has a scale of NaN, and all its elements are
NaN; finite values above 65,504 (``v``: its square) count as that. The format of the two moments is that of FlashOptim
(arXiv 2602.23349), the rounding is not.

A weight in 24 bits is a bfloat16 ``b`` and an ``int8`` residual ``r`` of what rounding lost, in 127ths of half a unit
in the last place of ``b``: ``b + r / 127 ULP(b) / 2``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 32
"""The number of elements that share a scale."""

_LARGEST = 65504.0
_SMALLEST = 2.0**-24


class Coded(NamedTuple):
    """A moment in eight bits: ``codes`` is int8 (first moment) or uint8 (second), ``scales`` float16, one a group."""

    codes: Tensor
    scales: Tensor


def group_count(elements: int) -> int:
    """Return the number of scales of a tensor with so many elements."""
    return -(-elements // GROUP)


def encode_first(values: Tensor) -> Coded:
    """Return the codes of a first moment, a dense float32 tensor, laid out in memory like it."""
    flat = _grouped(values)
    s = _scales(flat.abs().amax(1, keepdim=True))
    scale = s.float()
    cut = torch.maximum(torch.minimum(flat, scale), -scale)
    y = 254.0 * cut / (scale + cut.abs())
    codes = torch.where(y.isnan(), 0.0, y.round()).to(torch.int8)
    return Coded(_like(codes, values), s.flatten())


def decode_first(coded: Coded) -> Tensor:
    """Return the float32 values of a first moment, laid out in memory like its codes."""
    q = _grouped(coded.codes).float()
    return _like(q / (254.0 - q.abs()) * coded.scales.float()[:, None], coded.codes)


def encode_second(roots: Tensor, noise: Tensor | None = None, *, to_root: float = 1.0) -> Coded:
    """Return the codes of a second moment ``v`` from dense float32 ``roots``, laid out in memory like them.

    ``roots`` times ``to_root`` are ``sqrt(v)``. ``noise`` has 16 random bits for each element in memory order, as
    integers; without it, ``sqrt(v)`` is rounded to nearest.
    """
    flat, factor = _grouped(roots), torch.tensor(to_root, dtype=torch.float32, device=roots.device)
    s = _scales(flat.amax(1, keepdim=True) * factor)
    t = flat * (255.0 * factor / s.float())
    t = torch.where(t > 255.0, 255.0, t)
    u: Tensor | float = 0.5
    if noise is not None:
        u = _grouped(noise.to(torch.float32)) * 2.0**-16
    codes = (t + u).floor()
    codes = torch.where((codes == 0.0) & (flat > 0.0), 1.0, codes)
    codes = torch.where(t.isnan(), 0.0, codes).to(torch.uint8)
    return Coded(_like(codes, roots), s.flatten())


def decode_second(coded: Coded) -> Tensor:
    """Return the float32 values of a second moment, laid out in memory like its codes."""
    roots = _grouped(coded.codes).float() * (coded.scales.float() * (1.0 / 255.0))[:, None]
    return _like(roots * roots, coded.codes)


def split(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 weights as bfloat16 ones and their int8 residuals; a weight that is not finite has residual 0."""
    rounded = weights.to(torch.bfloat16)
    y = (weights - rounded.float()) * (127.0 / _half_ulp(rounded))
    return rounded, torch.where(y.isfinite(), y, 0.0).round().to(torch.int8)


def joined(rounded: Tensor, residuals: Tensor) -> Tensor:
    """Return the float32 weights that ``split`` took apart."""
    return rounded.float() + residuals.float() * (_half_ulp(rounded) * (1.0 / 127.0))


def root(values: Tensor) -> Tensor:
    """Return the square root, rounded to nearest; torch's own on the CPU may be off by a unit in the last place."""
    if values.dtype == torch.float32 and values.device.type == "cpu":
        return values.double().sqrt().float()
    return values.sqrt()


def _half_ulp(rounded: Tensor) -> Tensor:
    """Return half a unit in the last place of bfloat16 numbers; below 2^-111 they count as that."""
    exponent = (rounded.float().view(torch.int32) >> 23) & 0xFF
    return ((exponent.clamp(16, 254) - 8) << 23).view(torch.float32)


def _grouped(values: Tensor) -> Tensor:
    """Return values in memory order as rows of a group each, the last one filled up with zeros."""
    flat = torch.as_strided(values, (values.numel(),), (1,))
    missing = -flat.numel() % GROUP
    return torch.cat([flat, flat.new_zeros(missing)]).view(-1, GROUP)


def _like(grouped: Tensor, values: Tensor) -> Tensor:
    return torch.as_strided(grouped, values.shape, values.stride())


def _scales(largest: Tensor) -> Tensor:
    """Return the nearest float16 numbers from 2^-24 to 65,504, 0 for 0, and NaN for what is not finite."""
    nearest = torch.clamp(largest, max=_LARGEST).to(torch.float16)
    nearest = torch.where((nearest == 0.0) & (largest > 0.0), _SMALLEST, nearest)
    return torch.where(largest.isfinite(), nearest, torch.nan)
