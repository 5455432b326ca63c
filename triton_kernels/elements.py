"""Elements of a block: loads and stores, conversions between stored dtypes and those to compute in, exact roots."""

from __future__ import annotations

import triton
import triton.language as tl

from .estimates import corrected_quotient, corrected_root

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def load(pointer, lanes, mask, FULL: tl.constexpr):
    if FULL:
        return tl.load(tl.multiple_of(pointer + lanes, 16))
    else:
        return tl.load(pointer + lanes, mask=mask, other=0.0)


@triton.jit
def store(pointer, lanes, value, mask, FULL: tl.constexpr):
    if FULL:
        tl.store(tl.multiple_of(pointer + lanes, 16), value)
    else:
        tl.store(pointer + lanes, value, mask=mask)


@triton.jit
def exact_root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def exact_quotient(x, y):
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def nearest_root(square):
    """Return the root of a float32 number, the nearest where ``are_sure`` says so."""
    if INTERPRETED:
        return tl.sqrt_rn(square)
    else:
        return corrected_root(square)


@triton.jit
def nearest_quotient(a, b):
    """Return the quotient of float32 numbers, the nearest if it is at least 2^-100 in magnitude."""
    if INTERPRETED:
        return tl.div_rn(a, b)
    else:
        return corrected_quotient(a, b)


@triton.jit
def widened(value, T: tl.constexpr):
    """Convert ``value`` to ``T``. The upper of two neighbours in bfloat16 is widened by one mask, not moved first."""
    if (value.dtype == tl.bfloat16) and (not INTERPRETED):
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(T)


@triton.jit
def narrowed(value, TO: tl.constexpr):
    """Round ``value`` to the nearest number of ``TO``. The interpreter would truncate to bfloat16."""
    if (tl.bfloat16 == TO) and INTERPRETED:
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(TO)


@triton.jit
def quiet(value):
    """Make NaN 0x7FC00000, to which noise can be added."""
    if INTERPRETED:
        bits = value.to(tl.uint32, bitcast=True)
        return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:  # an operation of the hardware makes NaN 0x7FFFFFFF, which noise would turn into -0
        return tl.minimum(value.to(tl.int32, bitcast=True), 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def rounded(
    value, word, UPPER: tl.constexpr, TO: tl.constexpr, STOCHASTIC: tl.constexpr, QUIETS: tl.constexpr
):  # fmt: skip
    """Convert ``value``, if STOCHASTIC with half of a random word as noise; without QUIETS no NaN needs ``quiet``."""
    if (tl.bfloat16 != TO) or (not STOCHASTIC):
        return narrowed(value, TO)
    else:
        if QUIETS:
            value = quiet(value)
        bits = value.to(tl.uint32, bitcast=True)
        if UPPER:
            bits = bits + (word >> 16)
        elif INTERPRETED:
            bits = bits + (word & 0xFFFF)
        else:  # one instruction: the product of the lower half and 1, added
            bits = tl.inline_asm_elementwise(
                "dp2a.lo.u32.u32 $0, $1, 1, $2;", "=r,r,r", [word, bits], tl.uint32, is_pure=True, pack=1
            )
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
