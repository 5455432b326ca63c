"""Random bits, those of ``csrc/random.h``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product(a, b: tl.constexpr):
    """Return both halves of the 64-bit product of ``a`` and ``b``, which a GPU makes in one instruction."""
    product = a.to(tl.uint64) * tl.full(a.shape, b, tl.uint64)
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _philox(a, b, c, d, key0, key1):
    for _ in tl.static_range(10):
        high0, low0 = _product(a, 0xD2511F53)
        high1, low1 = _product(c, 0xCD9E8D57)
        a, b, c, d = high1 ^ b ^ key0, low1, high0 ^ d ^ key1, low0
        key0 = key0 + tl.full((), 0x9E3779B9, tl.uint32)
        key1 = key1 + tl.full((), 0xBB67AE85, tl.uint32)
    return a, b, c, d


@triton.jit
def _joined(low, high):
    return (high.to(tl.uint64) << 32) | low.to(tl.uint64)


@triton.jit
def random_words(key0, key1, number, step, begin, start, BLOCK: tl.constexpr, BOTH: tl.constexpr):
    """Return two random words for each of BLOCK elements starting at ``begin + start`` in the same chunk, both even
    (csrc/random.h); without BOTH, the second is the first again.

    As far as the number of the element has not reached them yet, the words are the same for the whole chunk.
    """
    first = ((begin + start) >> 1).to(tl.uint32) + tl.arange(0, BLOCK // 2).to(tl.uint32)
    a, b, c, d = _philox(first, (begin >> 33).to(tl.uint32), number, step, key0, key1)
    if not BOTH:
        words = tl.interleave(a, c)
        return words, words
    words = tl.interleave(_joined(a, b), _joined(c, d))  # at once, so that no words change threads
    return words.to(tl.uint32), (words >> 32).to(tl.uint32)


@triton.jit
def words_of_groups(key0, key1, number, step, first, GROUPS: tl.constexpr):
    """Return a random word for each of GROUPS groups of 32 elements from group ``first`` on, a multiple of 4, in the
    same chunk."""
    lanes = tl.arange(0, GROUPS)
    counter = (first >> 2).to(tl.uint32) + (lanes >> 2).to(tl.uint32)
    a, b, c, d = _philox(counter, (first >> 34).to(tl.uint32) | 0x80000000, number, step, key0, key1)
    return tl.where(lanes & 2 == 0, tl.where(lanes & 1 == 0, a, b), tl.where(lanes & 1 == 0, c, d))
