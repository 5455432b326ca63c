"""The distance by which the tests judge results."""

from __future__ import annotations

import pytest
import torch
from tolerances import ulps_apart


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_ulps_apart(dtype):
    one = torch.ones(3, dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert ulps_apart(one, one) == 0
    assert ulps_apart(one, one + eps) == 1
    assert ulps_apart(one, one - eps) == 2  # below a power of two, values are twice as dense
    assert ulps_apart(-one, -one - 3 * eps) == 3
    zero = torch.zeros(1, dtype=dtype)
    tiny = torch.finfo(dtype).smallest_normal * eps
    assert ulps_apart(zero, -zero) == 0
    assert ulps_apart(zero + tiny, zero - tiny) == 2
    nan = torch.full((1,), torch.nan, dtype=dtype)
    assert ulps_apart(nan, nan) == 0
    assert ulps_apart(nan, zero) > 1 << 60
    assert ulps_apart(torch.ones(0, dtype=dtype), torch.ones(0, dtype=dtype)) == 0
