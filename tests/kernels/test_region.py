"""Memory regions for the lists of tensors that one pass reads and writes."""

from __future__ import annotations

import itertools

import pytest
import torch

from nesterov_pp.kernels import extension, zeros_like

PAGE = 4096
pytestmark = pytest.mark.skipif(extension.load()[0] is None, reason="the C++ extension is not built")


def within_page(t: torch.Tensor) -> int:
    return t.data_ptr() % PAGE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_lie_in_their_pages_as_those_they_are_like(dtype):
    """Otherwise loads of a pass wait for stores to addresses with the same low bits."""
    base = torch.empty(3_000_000)
    like = [base[k * 700_000 + 16 * k :][:600_000] for k in range(4)]
    assert len({within_page(t) for t in like}) == 4
    for t, zeros in zip(like, zeros_like(like, [dtype] * 4), strict=True):
        assert within_page(zeros) == within_page(t)


def test_small_tensors_lie_side_by_side():
    like = [torch.empty(64) for _ in range(10_000)]
    zeros = zeros_like(like, [torch.float32] * len(like))
    assert all(b.data_ptr() - a.data_ptr() == 256 for a, b in itertools.pairwise(zeros))


def test_tensors_are_apart_aligned_and_zero_and_outlive_each_other():
    like = [torch.empty(n) for n in (1, 0, 17, 700_000, 3, 50_000, 20_000, 999_999)]
    zeros = zeros_like(like, [torch.float32] * len(like))
    spans = sorted((z.data_ptr(), z.data_ptr() + 4 * z.numel()) for z in zeros if z.numel())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(z.data_ptr() % 64 == 0 for z in zeros)
    assert all(z.storage_offset() == 0 for z in zeros)
    last = zeros.pop()
    last += 1
    assert all(not z.any() for z in zeros)
    del zeros
    assert bool((last == 1).all())


def test_layout_is_followed():
    like = [torch.empty(8, 64, 32, 32).to(memory_format=torch.channels_last), torch.empty(300, 2000).t()]
    for t, zeros in zip(like, zeros_like(like, [torch.float32] * 2), strict=True):
        assert zeros.stride() == t.stride()
        assert not zeros.any()
