"""Moments in eight bits and weights in twenty-four, in registers: what ``csrc/codes.h`` describes and computes.

A block holds whole groups of 32 elements; as rows of a matrix, a thread has a part of one row, and the largest of a
group takes two exchanges between neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import INTERPRETED, load, narrowed
from .estimates import corrected_quotient

GROUP = tl.constexpr(32)
_LARGEST = tl.constexpr(65504.0)
_SMALLEST = tl.constexpr(2.0**-24)
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves the nearest whole number in the low byte


@triton.jit
def _rows(x):
    return tl.reshape(x, [x.shape[0] // GROUP, GROUP])


@triton.jit
def _lanes(x):
    return tl.reshape(x, [x.shape[0] * GROUP])


@triton.jit
def _quotient(a, b):
    """Return a / b, to the nearest number if that is at least 2^-100 in magnitude."""
    if INTERPRETED:
        return tl.div_rn(a, b)
    else:
        return corrected_quotient(a, b)


@triton.jit
def _at_most(x, most):
    """Return the smaller of both, and ``most`` for NaN."""
    if INTERPRETED:
        return tl.where(x < most, x, most)
    else:
        return tl.minimum(x, most)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(magnitudes):
    """Return the largest of each row of numbers of at least 0, NaN if there is one."""
    if INTERPRETED:
        return tl.max(magnitudes.to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
    else:
        return tl.reduce(magnitudes, 1, _larger)


@triton.jit
def scales(pointer, start, count, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Load the scales of a block as float32."""
    groups = tl.arange(0, BLOCK // GROUP)
    return load(pointer + start // GROUP, groups, start + groups * GROUP < count, FULL).to(tl.float32)


@triton.jit
def _store_scales(pointer, scale, start, count, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Store the nearest scales, and return them as float32."""
    groups = tl.arange(0, BLOCK // GROUP)
    near = tl.where(scale > 0.0, tl.maximum(_at_most(scale, _LARGEST), _SMALLEST), 0.0).to(tl.float16)
    near = tl.where(scale < float("inf"), near, tl.full((), 0x7E00, tl.uint16).to(tl.float16, bitcast=True))
    if FULL:
        tl.store(pointer + start // GROUP + groups, near)
    else:
        tl.store(pointer + start // GROUP + groups, near, mask=start + groups * GROUP < count)
    return near.to(tl.float32)


@triton.jit
def first_of(codes, scale):
    code = _rows(codes.to(tl.float32))
    return _lanes(_quotient(code, 254.0 - tl.abs(code)) * scale[:, None])


@triton.jit
def second_of(codes, scale):
    root = _rows(codes.to(tl.float32)) * (scale * (1.0 / 255.0))[:, None]
    return _lanes(root * root)


@triton.jit
def encoded_first(m, pointer, start, count, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Store the scales of a first moment, and return its codes."""
    m = _rows(m)
    scale = _store_scales(pointer, _largest(tl.abs(m)), start, count, BLOCK, FULL)
    usable = scale > 0.0
    cut = _at_most(tl.abs(m), tl.where(usable, scale, 0.0)[:, None])
    y = _quotient(254.0 * cut, tl.where(usable, scale, 1.0)[:, None] + cut)
    return _lanes(_nearest(tl.where(m < 0.0, -y, y)))


@triton.jit
def encoded_second(root, to_root, noise, pointer, start, count, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Store the scales of a second moment, and return its codes.

    ``root`` times ``to_root`` is its root. ``noise`` has 16 random bits for each group in the upper half of a word.
    """
    root = _rows(root)
    scale = _store_scales(pointer, _largest(root) * to_root, start, count, BLOCK, FULL)
    usable = scale > 0.0
    factor = tl.where(usable, _quotient(255.0 * to_root, scale), 0.0)
    t = _at_most(root * factor[:, None], tl.where(usable, 255.0, 0.0)[:, None])
    golden = tl.arange(0, GROUP).to(tl.uint32) * (40503 << 16)
    u = ((noise[:, None] + golden[None, :]) >> 16).to(tl.float32) * 2.0**-16
    least = tl.where(usable[:, None] & (root > 0.0), 1.0, 0.0)
    return _lanes(tl.maximum(t + u, least).to(tl.int32).to(tl.uint8))


@triton.jit
def _nearest(x):
    """Return the nearest whole number, ties to even; 0 for NaN."""
    x = _at_most(x, 256.0)  # whose low byte is 0
    return (x + _ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _exponent(rounded):
    """Return the exponent of bfloat16 numbers given as floats, at least 16, in the place where a float has it."""
    return tl.maximum(rounded.to(tl.int32, bitcast=True) & 0x7F800000, 16 << 23)


@triton.jit
def joined(rounded, residual):
    """Return weights in 24 bits. A 127th of half a unit in the last place has the bits of 1 / 127 but the exponent."""
    part = (_exponent(rounded) + (0x3C010204 - (135 << 23))).to(tl.float32, bitcast=True)
    return rounded + residual.to(tl.float32) * part


@triton.jit
def residual_of(weight):
    """Return the nearest bfloat16 numbers and their residuals."""
    rounded = narrowed(weight, tl.bfloat16)
    wide = rounded.to(tl.float32)
    per_part = ((0x42FE0000 - _exponent(wide)) + (135 << 23)).to(tl.float32, bitcast=True)
    return rounded, _nearest((weight - wide) * per_part)
