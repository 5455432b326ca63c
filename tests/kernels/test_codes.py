"""Moments in eight bits and weights in 24: every code, the edges of the format, and drift over many steps."""

from __future__ import annotations

import pytest
import torch
from tolerances import DRIFT

from nesterov_pp.kernels.codes import (
    GROUP,
    Coded,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
    group_count,
    joined,
    split,
)
from nesterov_pp.kernels.rounding import noise_of_codes

SCALES = [1.0, 0.3, 65504.0, 2.0**-14, 3 * 2.0**-24, 2.0**-24]
"""From float16's largest number to its smallest."""


def encode_square(values, noise=None):
    return encode_second(values.sqrt(), noise)


FORMATS = [
    pytest.param(encode_first, decode_first, torch.arange(-127, 128).to(torch.int8), id="first"),
    pytest.param(encode_square, decode_second, torch.arange(256).to(torch.uint8), id="second"),
]


def beside_the_largest(codes, scale):
    """Return every code in a group of its own beside the largest code, which has the value of the scale."""
    rows = torch.zeros(len(codes), GROUP, dtype=codes.dtype)
    rows[:, 0], rows[:, 1] = codes.max(), codes
    return Coded(rows.flatten(), torch.full((len(codes),), scale).half())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("encode", "decode", "codes"), FORMATS)
def test_every_code_returns_and_codes_are_monotone(encode, decode, codes, scale):
    coded = beside_the_largest(codes, scale)
    values = decode(coded)
    again = encode(values)
    assert torch.equal(again.codes, coded.codes)
    assert torch.equal(again.scales, coded.scales)
    assert (values.view(-1, GROUP)[:, 1].diff() > 0).all()


@pytest.mark.parametrize(("encode", "decode", "codes"), FORMATS)
def test_values_between_codes_take_the_nearer(encode, decode, codes):
    values = decode(beside_the_largest(codes, 1.0)).view(-1, GROUP)[:, 1]
    low, high = values[:-1], values[1:]
    for share, expected in ((0.25, codes[:-1]), (0.75, codes[1:])):
        between = torch.zeros(len(low), GROUP)
        between[:, 0], between[:, 1] = 1.0, low + share * (high - low)
        found = encode(between.flatten()).codes.view(-1, GROUP)[:, 1]
        if encode is encode_square:
            expected = expected.clamp(min=1)  # 0 is kept for exactly 0
        assert torch.equal(found, expected)


@pytest.mark.parametrize("scale", SCALES)
def test_the_second_moment_is_right_on_average_and_never_0(scale):
    scale = float(torch.tensor(scale).half())
    values = torch.linspace(1.5 / 255, 1.0, GROUP).square() * scale**2
    values[-1] = scale**2
    draws = torch.arange(0, 1 << 16, 64)
    roots = torch.stack([decode_second(encode_square(values, u.expand(GROUP))).sqrt() for u in draws])
    torch.testing.assert_close(roots.double().mean(0), values.double().sqrt(), rtol=2e-3, atol=0.0)
    tiny = values.clone()
    tiny[0] = tiny[1] * 1e-9
    assert encode_square(tiny, draws[-1].expand(GROUP)).codes[0] == 1


@pytest.mark.parametrize(("encode", "decode", "codes"), FORMATS)
def test_groups_of_zeros_denormals_and_overflows(encode, decode, codes):
    zeros = encode(torch.zeros(40))
    assert not zeros.codes.any()
    assert not zeros.scales.any()
    assert torch.equal(decode(zeros), torch.zeros(40))
    smallest = encode(torch.full((3,), 1e-45))
    assert smallest.scales.item() == 2.0**-24
    assert decode(smallest).isfinite().all()
    largest = decode(encode(torch.tensor([1e30, 1.0])))
    assert largest[0] == pytest.approx(65504.0 if encode is encode_first else 65504.0**2, rel=1e-6)
    assert (decode(encode(torch.tensor([70000.0**2, 1.0]))) > 0).any()
    assert codes.max() == encode(torch.tensor([1e30])).codes[0]


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
@pytest.mark.parametrize(("encode", "decode", "codes"), FORMATS)
def test_what_is_not_finite_stays_visible_in_its_group_alone(encode, decode, codes, odd):
    values = torch.ones(3 * GROUP)
    values[GROUP + 5] = odd
    back = decode(encode(values))
    assert back[GROUP : 2 * GROUP].isnan().all()
    assert torch.equal(back[:GROUP], values[:GROUP])
    assert torch.equal(back[2 * GROUP :], values[2 * GROUP :])
    assert codes.numel() in (255, 256)


@pytest.mark.parametrize("shape", [(), (1,), (31,), (33,), (5, 13), (0,)])
@pytest.mark.parametrize(("encode", "decode", "codes"), FORMATS)
def test_tails_and_layouts(encode, decode, codes, shape):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    if len(shape) == 2:
        values = values.t()  # groups follow the memory, whatever the strides
    coded = encode(values)
    assert coded.codes.stride() == values.stride()
    assert coded.codes.dtype == codes.dtype
    assert coded.scales.shape == (group_count(values.numel()),)
    flat = encode(torch.as_strided(values, (values.numel(),), (1,)))
    assert torch.equal(flat.scales, coded.scales)
    torch.testing.assert_close(decode(coded), values, rtol=0.02, atol=1 / 64)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.99, 0.999)])
def test_drift_over_a_thousand_steps(betas):
    """Compare with float64, first with gradients of one size, then after they have shrunk tenfold."""
    generator = torch.Generator().manual_seed(0)
    n, (beta1, beta2) = 64 * GROUP, betas
    sizes = torch.exp(torch.randn(n, generator=generator))
    first, second = encode_first(torch.zeros(n)), encode_square(torch.zeros(n))
    m64, v64 = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for step in range(1000):
        g = torch.randn(n, generator=generator) * sizes * (1.0 if step < 500 else 0.1)
        m64 += (1 - beta1) * (g.double() - m64)
        v64 += (1 - beta2) * (g.double() ** 2 - v64)
        first = encode_first(decode_first(first) + (1 - beta1) * (g - decode_first(first)))
        noise = noise_of_codes(n, g.device, seed=0, tensor=0, step=step)
        second = encode_square(beta2 * decode_second(second) + (1 - beta2) * g * g, noise)
        if step in (499, 999):
            assert (decode_first(first) - m64).norm() < DRIFT["first moment"] * m64.norm()
            root = decode_second(second).double().sqrt() / v64.sqrt()
            low, median, high = root.quantile(torch.tensor([0.05, 0.5, 0.95]).double()).tolist()
            assert abs(median - 1) < DRIFT["median root"]
            assert 1 - DRIFT["root"] < low < high < 1 + DRIFT["root"]


def test_noise_is_that_of_eight_elements_a_counter():
    device = torch.device("cpu")
    whole = noise_of_codes(100, device, seed=7, tensor=3, step=2)
    assert torch.equal(noise_of_codes(13, device, seed=7, tensor=3, step=2), whole[:13])
    assert whole.min() >= 0
    assert whole.max() < 1 << 16
    assert whole.unique().numel() > 95
    for seed, tensor, step in ((8, 3, 2), (7, 4, 2), (7, 3, 3)):
        assert not torch.equal(noise_of_codes(100, device, seed=seed, tensor=tensor, step=step), whole)


def test_weights_in_24_bits():
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-100, 120, (10_000,), generator=generator)
    weights = torch.randn(10_000, generator=generator) * torch.exp2(exponents.float())
    rounded, residuals = split(weights)
    assert torch.equal(rounded, weights.bfloat16())
    torch.testing.assert_close(joined(rounded, residuals), weights, rtol=2.0**-15.9, atol=0.0)
    every = torch.arange(-126, 127).to(torch.int8)
    base = torch.full(every.shape, 1.5).bfloat16()
    again, same = split(joined(base, every))
    assert torch.equal(again, base)
    assert torch.equal(same, every)
    assert (joined(base, every).diff() > 0).all()


def test_weights_in_24_bits_that_are_not_finite_or_0():
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, 0.0, -0.0, 1e-40])
    rounded, residuals = split(odd)
    torch.testing.assert_close(rounded, odd.bfloat16(), equal_nan=True, rtol=0.0, atol=0.0)
    assert not residuals[:6].any()
    torch.testing.assert_close(joined(rounded, residuals), rounded.float(), equal_nan=True, rtol=0.0, atol=2.0**-118)
