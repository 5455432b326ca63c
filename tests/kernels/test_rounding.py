"""Stochastic rounding to bfloat16: its random bits, and its effect on weights and moments."""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS

import nesterov_pp as npp
from nesterov_pp.kernels import extension
from nesterov_pp.kernels.rounding import Noise, philox

C, REASON = extension.load()
ALL = 0xFFFFFFFF
LOW = torch.bfloat16


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ALL] * 4, (ALL << 32) | ALL, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, seed, expected):
    """Compare with the answers that the authors publish with Random123."""
    words = philox(tuple(torch.tensor([c]) for c in counter), seed)
    assert [int(w) for w in words] == expected


@pytest.mark.parametrize("value", [1.0 + 2**-9, -(1.0 + 2**-9), 3.0e-39, 1.0 + 2**-8 + 2**-11, 3.0, 0.0])
def test_rounding_is_right_on_average_and_to_a_neighbour(value):
    count = 100_000
    exact = torch.tensor(value).double()
    rounded = Noise(seed=1, tensor=0, step=1).round(torch.full((count,), value), 0)
    found = rounded.unique().double()
    gap = float(found.max() - found.min())
    assert len(found) <= 2
    assert found.min() <= exact <= found.max()
    assert float((found - exact).abs().max()) <= gap or gap == 0.0
    # Five standard deviations of the mean of a two-valued variable.
    assert abs(float(rounded.double().mean() - exact)) <= 5 * 0.5 * gap / count**0.5
    assert len(found) == (1 if value in (3.0, 0.0) else 2)


def test_special_values():
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0])
    rounded = Noise(seed=3, tensor=0, step=1).round(values, 1)
    assert rounded[0] == float("inf")
    assert rounded[1] == float("-inf")
    assert rounded[2].isnan()
    assert rounded[3].float().view(torch.int32) == -(1 << 31)


def step(
    seed: int, *, backend: str, steps: int = 2, state_dtype=None, shapes=((1001,), (3, 5), (1,), (130, 130), (400_001,))
):
    generator = torch.Generator().manual_seed(0)
    ps = [torch.nn.Parameter(torch.randn(s, generator=generator).to(LOW)) for s in shapes]
    optimizer = npp.NAdam(ps, lr=1e-2, backend=backend, state_dtype=state_dtype, stochastic_rounding=True, seed=seed)
    for _ in range(steps):
        for p in ps:
            p.grad = torch.randn(p.shape, generator=generator).to(LOW)
        optimizer.step()
    return [p.detach() for p in ps], [s["exp_avg"] for s in optimizer.state.values()]


@pytest.mark.parametrize("state_dtype", [None, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rerun_gives_the_same_bits_and_another_seed_others(backend, state_dtype):
    first, again, other = (step(seed, backend=backend, state_dtype=state_dtype)[0] for seed in (5, 5, 2**64 - 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert 0.05 < float((first[3] != other[3]).float().mean()) < 0.95


@pytest.mark.skipif(C is None, reason=str(REASON))
@pytest.mark.parametrize("state_dtype", [None, torch.float32])
def test_backends_instruction_sets_and_threads_take_the_same_bits(state_dtype):
    """A weight differs from the reference only if its value before rounding does, in the last bit of float32."""
    expected = step(5, backend="reference", state_dtype=state_dtype)
    selected, threads = C.isa(), torch.get_num_threads()
    results = []
    try:
        for isa in C.isas():
            for count in (1, 2):
                C.set_isa(isa)
                torch.set_num_threads(count)
                results.append(step(5, backend="cpu", state_dtype=state_dtype))
    finally:
        C.set_isa(selected)
        torch.set_num_threads(threads)
    for weights, moments in results:
        for found, first in zip(weights + moments, results[0][0] + results[0][1], strict=True):
            assert torch.equal(found, first)
    for found, wanted in zip(results[0][0], expected[0], strict=True):
        assert float((found != wanted).float().mean()) <= 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_and_steps_take_different_bits(backend):
    """Equal parameters with equal gradients diverge, and a parameter is rounded with new bits in every step."""
    ps = [torch.nn.Parameter(torch.ones(4096, dtype=LOW)) for _ in range(2)]
    optimizer = npp.NAG(ps, lr=2**-10, momentum=0.0, backend=backend, stochastic_rounding=True)
    seen = []
    for _ in range(2):
        for p in ps:
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
        optimizer.step()
        seen += [p.detach().clone() for p in ps]
    for i, a in enumerate(seen):
        assert set(a.unique().tolist()) == {1.0, 1.0 - 2**-8}  # the step is a quarter of the spacing below one
        assert abs(float((a != 1.0).float().mean()) - 0.25) < 0.04
        for b in seen[:i]:
            assert 0.3 < float((a != b).float().mean()) < 0.45  # independent draws give 2 (1/4)(3/4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_steps_add_up(backend):
    """A hundred steps of 1/40 of the spacing are lost if rounded to nearest, and add up if rounded stochastically."""
    ends = []
    for stochastic in (False, True):
        p = torch.nn.Parameter(torch.ones(10_000, dtype=LOW))
        optimizer = npp.NAG([p], lr=2**-8 / 40, momentum=0.0, backend=backend, stochastic_rounding=stochastic)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends.append(float(p.detach().double().mean()))
    assert ends[0] == 1.0
    assert abs(ends[1] - (1.0 - 100 * 2**-8 / 40)) < 1e-3


def test_float16_is_refused():
    with pytest.raises(ValueError, match="stochastic_rounding is for bfloat16, but a parameter is float16"):
        npp.NAdam([torch.nn.Parameter(torch.ones(3, dtype=torch.float16))], stochastic_rounding=True)
