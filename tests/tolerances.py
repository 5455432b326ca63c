"""Tolerances for comparing results: one table for all tests.

One step may differ by four roundings of a value of order one (four machine epsilons), where terms cancel; a run by a
hundred. The values follow from the machine epsilon (1.2e-7 for float32, 2.2e-16 for float64), not from results.
"""

from __future__ import annotations

import torch

ONE_STEP = {torch.float32: {"rtol": 1e-6, "atol": 5e-7}, torch.float64: {"rtol": 1e-14, "atol": 1e-15}}
MANY_STEPS = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-13}}
EXACT = {"rtol": 0.0, "atol": 0.0}

DRIFT = {"first moment": 0.1, "median root": 0.02, "root": 0.4}
"""The allowed distance of moments in eight bits from those in float64 after a thousand steps.

A code of the first moment is 1/254 to 1/64 of the largest in its group, and beta1 = 0.99 adds up seven roundings: the
norm of the error is below a tenth of the moment's. A code of the second moment's root is 1/255 of the largest, and
beta2 = 0.999 adds up twenty at random: a root of a fortieth of the largest, six codes, has a standard deviation of a
quarter, so 90 % of such roots are within the last number. Rounding is right on average, so the median of 2,000 roots is
within two standard errors of a hundredth.
"""

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
ULPS = {torch.bfloat16: 1, torch.float16: 1}
"""The allowed distance between two backends' results of one step, in units in the last place: both compute in float32,
so a value next to a midpoint may be rounded either way."""


def ulps_apart(a: torch.Tensor, b: torch.Tensor) -> int:
    """Return the largest distance between elements, counted in representable values.

    Zeros of either sign are equal, and so are NaNs; a NaN and a number are as far apart as possible.
    """
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    if a.numel() == 0:
        return 0

    def ordered(t: torch.Tensor) -> torch.Tensor:
        integer = _INTEGER[t.element_size()]
        bits = t.detach().contiguous().view(integer)
        # Magnitudes count up from zero in both directions.
        return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits).to(torch.int64)

    x, y = ordered(a), ordered(b)
    half = torch.iinfo(torch.int64).max // 2
    apart = x.abs().clamp(max=half) + y.abs().clamp(max=half)  # for values on both sides of zero
    distance = torch.where((x < 0) == (y < 0), (x - y).abs(), apart)
    distance[a.isnan() & b.isnan()] = 0
    distance[a.isnan() ^ b.isnan()] = torch.iinfo(torch.int64).max // 2
    return int(distance.max())
