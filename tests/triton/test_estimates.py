"""The roots and quotients of the Triton kernels, computed from their source by NumPy; no GPU is needed.

Triton's interpreter computes exact ones and does not fuse multiply-adds, so here the functions see NumPy in the place
of ``triton.language``, with estimates that are as wrong as the hardware's may be.
"""

from __future__ import annotations

import types

import numpy as np
import pytest

pytest.importorskip("triton")

from nesterov_pp.kernels.backend import _triton_plans

# Units in the last place that PTX promises: 2^-22.9 of the inverse root, and 1.
ROOT_ERROR, INVERSE_ERROR = 2, 1
# Only for this significand and a power of 2 as dividend does the quotient need the nearest inverse. CUDA's own division
# takes the same instructions, so the hardware has it.
LARGEST = np.float32(2 - 2.0**-23)
LEAST, BLOCK = np.float32(2.0**-100), 4


class Lanes(np.ndarray):
    """An array with the methods of a tensor of Triton."""

    def to(self, dtype: type, bitcast: bool = False) -> Lanes:
        return self.view(dtype) if bitcast else self.astype(dtype)


def lanes(values: np.ndarray) -> Lanes:
    return np.asarray(values, np.float32).view(Lanes)


def fma(a: object, b: object, c: object) -> Lanes:
    """Return a b + c, rounded once: the sum of doubles is rounded to odd, and then to float32."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    c = np.asarray(c, np.float64)
    total = product + c
    shadow = total - product
    rest = (product - (total - shadow)) + (c - shadow)
    even = (np.atleast_1d(total).view(np.int64).reshape(total.shape) & 1) == 0
    away = np.nextafter(total, np.where(rest > 0, np.inf, -np.inf))
    return lanes(np.where((rest != 0) & even & np.isfinite(total), away, total))


def off_by(nearest: Lanes, off: int) -> Lanes:
    """Return numbers ``off`` units in the last place away; what is 0 or not finite stays."""
    near = (nearest.view(np.int32) + off).view(np.float32)
    return lanes(np.where(np.isfinite(nearest) & (nearest != 0), near, nearest))


def flushed(x: Lanes) -> np.ndarray:
    return np.where(np.abs(x) < 2.0**-126, 0, x).astype(np.float64)


def language(root_off: int, inverse_off: int) -> types.SimpleNamespace:
    """Return a ``triton.language`` whose estimates are so many units in the last place away from the nearest number."""

    def assembly(code: str, constraints: str, args: list[Lanes], dtype: object, is_pure: bool, pack: int) -> Lanes:
        assert (code, constraints, pack) == ("rcp.approx.ftz.f32 $0, $1;", "=f,f", 1)
        nearest = lanes(flushed(lanes(1 / flushed(args[0]))))
        significands = np.abs(np.frexp(args[0])[0]) * 2
        return lanes(np.where(significands == LARGEST, nearest, off_by(nearest, inverse_off)))

    return types.SimpleNamespace(
        rsqrt=lambda x: off_by(lanes(1 / np.sqrt(flushed(x))), root_off),
        inline_asm_elementwise=assembly,
        fma=fma,
        abs=np.abs,
        minimum=np.fmin,
        where=lambda mask, a, b: np.where(mask, a, np.float32(b)).view(Lanes),
        reshape=np.reshape,
        min=lambda x, axis=None: np.fmin.reduce(x, axis=axis),
        sum=np.sum,
        int32=np.int32,
        float32=np.float32,
        constexpr=object,
    )


def estimates(root_off: int, inverse_off: int) -> types.SimpleNamespace:
    """Return the functions of ``triton_kernels/estimates.py``, on arrays."""
    _triton_plans()
    from nesterov_pp.triton_kernels import estimates as module

    names: dict[str, object] = {"tl": language(root_off, inverse_off), "_LEAST_BITS": module._LEAST_BITS.value}
    for name in ("estimated_inverse", "corrected_root", "corrected_quotient", "quotient_of_code", "are_sure"):
        names[name] = types.FunctionType(getattr(module, name).fn.__code__, names, name)
    return types.SimpleNamespace(**names)


def drawn(generator: np.random.Generator, low: int, high: int, count: int = 200_000) -> np.ndarray:
    """Return numbers of magnitude 2^low to 2^high, two thirds of them with few bits or close to a power of 2."""
    significands = 1 + generator.random(count)
    significands[::3] = 1 + generator.integers(0, 1 << 12, significands[::3].shape) * 2.0**-12
    significands[1::3] = 2 - generator.integers(1, 64, significands[1::3].shape) * 2.0**-23
    return np.ldexp(significands, generator.integers(low, high, count)).astype(np.float32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("off", range(-ROOT_ERROR, ROOT_ERROR + 1))
def test_roots_are_nearest(off):
    """Test the whole range in which a block can be sure, and squares of midpoints between neighbours."""
    root = estimates(off, 0).corrected_root
    generator = np.random.default_rng(0)
    midpoints = drawn(generator, -50, 63).astype(np.float64) * (1 + 2.0**-24)
    for squares in (drawn(generator, -100, 128), (midpoints**2).astype(np.float32)):
        assert np.array_equal(root(lanes(squares)), np.sqrt(squares))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("off", range(-INVERSE_ERROR, INVERSE_ERROR + 1))
def test_quotients_are_nearest(off):
    """Test the whole range in which a block can be sure, with every kind of dividend by every kind of divisor."""
    quotient = estimates(0, off).corrected_quotient
    generator = np.random.default_rng(0)
    for _ in range(4):
        a, b = drawn(generator, -100, 126), generator.permutation(drawn(generator, -50, 100))
        nearest = a / b
        sure = (nearest >= LEAST) & (nearest < 2.0**126)
        assert sure.sum() > len(a) // 2
        for sign in (1, -1):
            assert np.array_equal(quotient(lanes(sign * a), lanes(b))[sure], sign * nearest[sure])


@pytest.mark.parametrize("off", range(-INVERSE_ERROR, INVERSE_ERROR + 1))
def test_quotients_of_all_codes_are_nearest(off):
    codes = np.arange(-127, 128).astype(np.float32)
    divisors = 254 - np.abs(codes)
    found = estimates(0, off).quotient_of_code(lanes(codes), lanes(divisors))
    assert np.array_equal(found, codes / divisors)


def test_estimates_far_off_are_found():
    found = estimates(1 << 14, 1 << 14)
    generator = np.random.default_rng(0)
    a, b = drawn(generator, -100, 20), drawn(generator, -50, 20)
    assert not np.array_equal(found.corrected_root(lanes(b)), np.sqrt(b))
    assert not np.array_equal(found.corrected_quotient(lanes(a), lanes(b)), a / b)


@pytest.mark.parametrize("off", [(-ROOT_ERROR, INVERSE_ERROR), (0, 0), (ROOT_ERROR, -INVERSE_ERROR)])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 2.0**40])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_sure_step_has_the_bits_of_an_exact_one(off, eps):
    found = estimates(*off)
    generator = np.random.default_rng(1)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**-149, 2.0**-126, 2.0**-101, 2.0**-100, 2.0**127, 3e38]

    def mixed(low: int, high: int) -> np.ndarray:
        values = generator.permutation(drawn(generator, low, high, BLOCK * 10_000))
        mask = generator.random(len(values)) < 0.05
        values[mask] = generator.choice(special, mask.sum())
        return values.reshape(-1, BLOCK)

    eps = np.float32(eps)
    weights, momenta, squares = mixed(-10, 4), mixed(-100, 126), np.abs(mixed(-100, 126))
    momenta *= generator.choice([-1, 1], momenta.shape).astype(np.float32)
    quotients = found.corrected_quotient(lanes(momenta), found.corrected_root(lanes(squares)) + eps)
    new = lanes(weights) - quotients
    exact = weights - momenta / (np.sqrt(squares) + eps)
    blocks = zip(lanes(squares), quotients, new, strict=True)
    sure = np.array([found.are_sure(*block) for block in blocks])
    assert len(sure) // 20 < sure.sum() < len(sure)
    assert np.array_equal(new[sure].view(np.int32), exact[sure].view(np.int32))
