"""Moments in eight bits and weights in twenty-four, in registers: what ``csrc/codes.h`` describes and computes.

A block holds whole groups of 32 elements; as rows of a matrix, a thread has a part of one row, and the largest of a
group takes two exchanges between neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import INTERPRETED, load, narrowed, nearest_quotient, widened
from .estimates import quotient_of_code

GROUP = tl.constexpr(32)
_LARGEST = tl.constexpr(65504.0)
_SMALLEST = tl.constexpr(2.0**-24)
_TINY_TO_FRACTION = tl.constexpr(2.0**126)  # 2^-149 is the smallest float, and 2^-23 the unit of a fraction
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves the nearest whole number in the low byte


@triton.jit
def rows_of(x):
    return tl.reshape(x, [x.shape[0] // GROUP, GROUP])


@triton.jit
def lanes_of(x):
    return tl.reshape(x, [x.shape[0] * GROUP])


@triton.jit
def _at_most(x, most):
    """Return the smaller of both, and ``most`` for NaN."""
    if INTERPRETED:
        return tl.where(x < most, x, most)
    else:
        return tl.minimum(x, most)


@triton.jit
def _at_least(x, least):
    """Return the larger of two numbers."""
    if INTERPRETED:
        return tl.where(x > least, x, least)
    else:
        return tl.maximum(x, least)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_of_rows(magnitudes):
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
def _store_scales(pointer, largest, start, count, BLOCK: tl.constexpr, FULL: tl.constexpr, SURE: tl.constexpr):
    """Store the nearest scales, and return them as float32. With SURE, ``largest`` are finite."""
    groups = tl.arange(0, BLOCK // GROUP)
    near = tl.where(largest > 0.0, tl.maximum(_at_most(largest, _LARGEST), _SMALLEST), 0.0).to(tl.float16)
    if not SURE:
        not_a_number = tl.full((), 0x7E00, tl.uint16).to(tl.float16, bitcast=True)
        near = tl.where(largest < float("inf"), near, not_a_number)
    if FULL:
        tl.store(pointer + start // GROUP + groups, near)
    else:
        tl.store(pointer + start // GROUP + groups, near, mask=start + groups * GROUP < count)
    return near.to(tl.float32)


@triton.jit
def first_of(codes, scale):
    """Return a first moment, s q / (254 - |q|)."""
    code = rows_of(codes.to(tl.float32))
    divisor = 254.0 - tl.abs(code)
    share = tl.div_rn(code, divisor) if INTERPRETED else quotient_of_code(code, divisor)
    return lanes_of(share * scale[:, None])


@triton.jit
def second_of(codes, scale):
    """Return a second moment, (q s / 255)^2."""
    unit = (scale * (1.0 / 255.0))[:, None]
    if INTERPRETED:
        root = rows_of(codes.to(tl.float32)) * unit
    else:  # q as the last byte of 2^23 + q; 2^23 units are subtracted before the product is rounded
        shifted = tl.inline_asm_elementwise(
            "prmt.b32 $0, $4, 0x4B000000, 0x7650; prmt.b32 $1, $4, 0x4B000000, 0x7651;"
            "prmt.b32 $2, $4, 0x4B000000, 0x7652; prmt.b32 $3, $4, 0x4B000000, 0x7653;",
            "=r,=r,=r,=r,r", [codes], tl.uint32, is_pure=True, pack=4,
        )  # fmt: skip
        root = tl.fma(rows_of(shifted).to(tl.float32, bitcast=True), unit, unit * -(2.0**23))
    return lanes_of(root * root)


@triton.jit
def encoded_first(m, pointer, start, count, BLOCK: tl.constexpr, FULL: tl.constexpr, SURE: tl.constexpr):
    """Store the scales of a first moment, and return its codes. With SURE, all elements are finite."""
    m = rows_of(m)
    scale = _store_scales(pointer, largest_of_rows(tl.abs(m)), start, count, BLOCK, FULL, SURE)[:, None]
    cut = _at_least(_at_most(m, scale), -scale)
    return lanes_of(_nearest(nearest_quotient(254.0 * cut, scale + tl.abs(cut))))


@triton.jit
def encoded_second(
    root, to_root, noise, pointer, start, count, BLOCK: tl.constexpr, FULL: tl.constexpr, SURE: tl.constexpr
):  # fmt: skip
    """Store the scales of a second moment, and return its codes.

    ``root`` times ``to_root`` is its root; with SURE, all are above 0 and finite. ``noise`` has 16 random bits for each
    group in the upper half of a word.
    """
    root = rows_of(root)
    scale = _store_scales(pointer, largest_of_rows(root) * to_root, start, count, BLOCK, FULL, SURE)
    factor = nearest_quotient(255.0 * to_root, scale)[:, None]
    golden = tl.arange(0, GROUP).to(tl.uint32) * (40503 << 16)
    # Bits as those of a float, which is tiny: a power of 2 makes it the fraction that they stand for.
    u = (((noise & 0xFFFF0000)[:, None] + golden[None, :]) >> 9).to(tl.float32, bitcast=True)
    code = tl.fma(u, _TINY_TO_FRACTION, root * factor)
    code = tl.maximum(code, 1.0) if SURE else tl.where((code < 1.0) & (root > 0.0), 1.0, code)
    return lanes_of(_rounded_down(code))


@triton.jit
def _rounded_down(x):
    """Return numbers of at least 0 as codes: rounded down, 255 if they are above that, and 0 for NaN."""
    if INTERPRETED:
        return tl.where(x == x, tl.where(x < 255.0, x, 255.0), 0.0).to(tl.int32).to(tl.uint8)
    else:
        code = tl.inline_asm_elementwise("cvt.rzi.u8.f32 $0, $1;", "=r,f", [x], tl.uint32, is_pure=True, pack=1)
        return code.to(tl.uint8)


@triton.jit
def _nearest(x):
    """Return the nearest whole number, ties to even, of numbers from -127 to 127; 0 for NaN."""
    if INTERPRETED:
        return (tl.where(x == x, x, 0.0) + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        code = tl.inline_asm_elementwise("cvt.rni.s8.f32 $0, $1;", "=r,f", [x], tl.int32, is_pure=True, pack=1)
        return code.to(tl.int8)


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
def residual_of(weight, SURE: tl.constexpr):
    """Return the nearest bfloat16 numbers and their residuals. With SURE, all weights are finite."""
    rounded = narrowed(weight, tl.bfloat16)
    wide = widened(rounded, tl.float32)
    per_part = ((0x42FE0000 - _exponent(wide)) + (135 << 23)).to(tl.float32, bitcast=True)
    rest = (weight - wide) * per_part  # infinite where rounding overflows
    if not SURE:
        rest = _at_most(rest, 256.0)  # whose low byte is 0
    return rounded, (rest + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
