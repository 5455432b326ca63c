"""Random bits in plain torch, those of ``csrc/random.h``: for rounding to bfloat16, and to codes of eight bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nesterov_pp.kernels.codes import GROUP, group_count

_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Philox-4x32-10 (Salmon et al., SC 2011) of a counter, keyed by a 64-bit seed.

    Counter and result are four int64 tensors of 32-bit words. Products of two words wrap around in int64, which
    preserves their bits.
    """
    a, b, c, d = counter
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        product0, product1 = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (
            ((product1 >> 32) & _WORD) ^ b ^ key0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ d ^ key1,
            product0 & _WORD,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return a, b, c, d


class Noise:
    """The random bits of one parameter's step: 16 for each element of each stored value.

    Elements are counted in memory order. ``which`` is 0 for the weight, 1 and 2 for the moments, and 3 for the running
    mean of a correction.
    """

    def __init__(self, *, seed: int, tensor: int, step: int) -> None:
        self._seed, self._tensor, self._step = seed, tensor, step
        self._words: _Words | None = None

    def round(self, value: Tensor, which: int) -> Tensor:
        """Round a dense float32 ``value`` to bfloat16, up or down with probabilities that make it right on average."""
        words = self._of(value)
        noise = (words.first & 0xFFFF, words.first >> 16, words.second & 0xFFFF, words.second >> 16)[which]
        flat = _in_memory_order(value)
        rounded = ((flat.view(torch.int32).to(torch.int64) & _WORD) + noise) & 0xFFFF0000
        result = torch.where(flat.isnan(), flat, _as_int32(rounded).view(torch.float32)).to(torch.bfloat16)
        return torch.as_strided(result, value.shape, value.stride())

    def _of(self, value: Tensor) -> _Words:
        if self._words is None:
            self._words = _words(value.numel(), value.device, seed=self._seed, tensor=self._tensor, step=self._step)
        return self._words


class _Words(NamedTuple):
    first: Tensor
    second: Tensor


def _words(count: int, device: torch.device, *, seed: int, tensor: int, step: int) -> _Words:
    block = torch.arange((count + 1) // 2, device=device)
    like = torch.zeros_like(block)
    a, b, c, d = philox((block & _WORD, block >> 32, like + tensor, like + step), seed)
    return _Words(torch.stack([a, c], 1).flatten()[:count], torch.stack([b, d], 1).flatten()[:count])


def noise_of_codes(count: int, device: torch.device, *, seed: int, tensor: int, step: int) -> Tensor:
    """Return 16 random bits for the second moment of each element in memory order, as int64.

    A group has one random number, and its element ``k`` that number plus ``k`` times the golden ratio, modulo 2^16.
    """
    groups = group_count(count)
    block = torch.arange((groups + 3) // 4, device=device)
    like = torch.zeros_like(block)
    words = philox((block & _WORD, (block >> 32) | 0x80000000, like + tensor, like + step), seed)
    start = torch.stack(words, 1).flatten()[:groups, None] >> 16
    return ((start + 40503 * torch.arange(GROUP, device=device)) & 0xFFFF).flatten()[:count]


def _in_memory_order(value: Tensor) -> Tensor:
    return torch.as_strided(value, (value.numel(),), (1,))


def _as_int32(words: Tensor) -> Tensor:
    return torch.where(words > 0x7FFFFFFF, words - (1 << 32), words).to(torch.int32)
