"""Older versions of weights as 8-bit differences: what ``nesterov_pp.kernels.differences`` describes, in Triton.

A program takes a chunk of one tensor. The table has a row of words for each tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import GROUP, ROUNDER, lanes_of, largest_of_rows, rows_of
from .elements import exact_quotient, load, narrowed, store, widened

CHUNK = 4096
"""The number of elements of one tensor in an entry of ``chunks``."""
WORDS = 5
"""The words of a tensor in the table: the addresses of its two versions, its number of elements, where its codes begin
in a row, and whether all addresses are multiples of 16."""

_CHUNK = tl.constexpr(CHUNK)
_WORDS = tl.constexpr(WORDS)
_LARGEST = tl.constexpr(127.0)


@triton.jit
def _span(table, chunks, S: tl.constexpr):
    """Return this program's part of a tensor: both versions, the number of elements, the first code, the alignment."""
    word = tl.load(chunks + tl.program_id(0))
    row = table + (word >> 32) * _WORDS
    begin = (word & 0xFFFFFFFF) * _CHUNK
    a = tl.load(row).to(tl.pointer_type(S)) + begin
    b = tl.load(row + 1).to(tl.pointer_type(S)) + begin
    count = tl.minimum(tl.load(row + 2) - begin, _CHUNK).to(tl.int32)
    return a, b, count, tl.load(row + 3) + begin, tl.load(row + 4)


@triton.jit
def _store_scales(pointer, scale, start, count, BLOCK: tl.constexpr, FULL: tl.constexpr):
    groups = tl.arange(0, BLOCK // GROUP)
    tl.store(pointer + start // GROUP + groups, scale, mask=FULL | (start + groups * GROUP < count))


@triton.jit
def _encode_block(before, after, codes, scales, start, count, BLOCK: tl.constexpr, FULL: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    mask = start + lanes < count
    new = widened(load(after + start, lanes, mask, FULL), tl.float32)
    difference = rows_of(new - widened(load(before + start, lanes, mask, FULL), tl.float32))
    scale = narrowed(exact_quotient(largest_of_rows(tl.abs(difference)), _LARGEST), tl.bfloat16)
    step = widened(scale, tl.float32)
    usable = (step > 0.0) & (step < float("inf"))
    q = tl.where(usable[:, None], exact_quotient(difference, tl.where(usable, step, 1.0)[:, None]), 0.0)
    q = tl.where(q > _LARGEST, _LARGEST, tl.where(q < -_LARGEST, -_LARGEST, q))
    q = lanes_of((q + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8))
    store(codes + start, lanes, q, start + lanes < (count + GROUP - 1) // GROUP * GROUP, FULL)
    _store_scales(scales, scale, start, count, BLOCK, FULL)


@triton.jit
def encode_kernel(table, chunks, codes, scales, S: tl.constexpr, BLOCK: tl.constexpr):
    """Write the codes, int8, and the scales, bfloat16, of the difference of two versions of tensors of dtype S."""
    before, after, count, place, aligned = _span(table, chunks, S)
    codes += place
    scales += place // GROUP
    start = 0
    if aligned != 0:
        while start + BLOCK <= count:
            _encode_block(before, after, codes, scales, start, count, BLOCK, True)
            start += BLOCK
    while start < count:
        _encode_block(before, after, codes, scales, start, count, BLOCK, False)
        start += BLOCK


@triton.jit
def _decode_block(
    newest, out, codes, scales, numbers, rows, length, start, count, S: tl.constexpr, BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    mask = start + lanes < count
    groups = tl.arange(0, BLOCK // GROUP)
    total = rows_of(tl.zeros([BLOCK], tl.float32))
    for k in range(rows):
        first = tl.load(numbers + k) * length
        q = rows_of(load(codes + first + start, lanes, mask, FULL).to(tl.float32))
        scale = tl.load(scales + (first + start) // GROUP + groups, mask=start + groups * GROUP < count, other=0.0)
        total += q * widened(scale, tl.float32)[:, None]
    new = widened(load(newest + start, lanes, mask, FULL), tl.float32)
    store(out + start, lanes, narrowed(new - lanes_of(total), S), mask, FULL)


@triton.jit(do_not_specialize=["rows", "length"])
def decode_kernel(table, chunks, codes, scales, numbers, rows, length, S: tl.constexpr, BLOCK: tl.constexpr):
    """Write the version before the differences whose row ``numbers`` are given, newest first. A row has ``length``
    codes."""
    newest, out, count, place, aligned = _span(table, chunks, S)
    codes += place
    scales += place // GROUP
    start = 0
    if aligned != 0:
        while start + BLOCK <= count:
            _decode_block(newest, out, codes, scales, numbers, rows, length, start, count, S, BLOCK, True)
            start += BLOCK
    while start < count:
        _decode_block(newest, out, codes, scales, numbers, rows, length, start, count, S, BLOCK, False)
        start += BLOCK
