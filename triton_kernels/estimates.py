"""Roots and quotients of float32 without branches of their own.

They are estimates by the hardware that fused multiply-adds correct to the nearest number: the instructions of CUDA's
own roots and quotients, which ask in addition, for each of them, whether no intermediate result overflows or loses
bits. Here a program asks once for all elements of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LEAST_BITS = tl.constexpr(0x1E800000)  # of 2^-66


@triton.jit
def corrected_root(square):
    inverse = tl.rsqrt(square)
    root = square * inverse
    return tl.fma(tl.fma(-root, root, square), inverse * 0.5, root)


@triton.jit
def estimated_inverse(x):
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def corrected_quotient(a, b):
    inverse = estimated_inverse(b)
    inverse = tl.fma(tl.fma(-b, inverse, 1.0), inverse, inverse)
    quotient = a * inverse
    return tl.fma(tl.fma(-b, quotient, a), inverse, quotient)


@triton.jit
def quotient_of_code(code, divisor):
    """Return the quotient q / (254 - |q|) of a code, the nearest for each of the codes: one correction is enough."""
    inverse = estimated_inverse(divisor)
    quotient = code * inverse
    return tl.fma(tl.fma(-divisor, quotient, code), inverse, quotient)


@triton.jit
def are_sure(square, quotient, result):
    """Return whether the roots of ``square`` and the quotients are the nearest numbers in the whole block.

    They are if square, dividend and quotient are at least 2^-100 in magnitude, so that remainders are numbers of
    float32, and ``result``, which is computed from the quotient, is finite: an overflow, an infinite weight and NaN end
    there. Where square and quotient are at least 2^-66, the dividend, the product of the quotient and a number that is
    not below the root, is at least 2^-99.
    """
    least = tl.minimum(square, tl.abs(quotient))
    # Each thread asks for its own elements first, four neighbours at a time. A finite sum has only finite terms.
    groups: tl.constexpr = least.shape[0] // 4
    least = tl.min(tl.reshape(least, [groups, 4]), axis=1)
    total = tl.sum(tl.reshape(result, [groups, 4]), axis=1)
    least = tl.where(tl.abs(total) < float("inf"), least, 0.0)
    return tl.min(least.to(tl.int32, bitcast=True)) >= _LEAST_BITS  # integers, which a warp compares in one instruction
