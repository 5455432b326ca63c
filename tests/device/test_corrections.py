"""Corrections and predictions on the device backends: on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import pytest
import torch
from corrected import CASES, RULES, run

import nesterov_pp as npp
from nesterov_pp.optim import GapAware
from tests.device.devices import BACKENDS, DEVICE, needs, skip_without_any
from tests.tolerances import MANY_STEPS

skip_without_any()
LISTED = [1, 3, 64, 1000, 2500]
DTYPES = [
    (torch.float32, None),
    (torch.float64, None),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
]


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    needs(request.param)
    return request.param


def assert_same_bits(rule, options, backend, dtype, sizes=LISTED) -> None:
    ours, optimizer = run(rule, options, backend, dtype, sizes=sizes, device=DEVICE)
    assert optimizer.backend == backend
    expected, _ = run(rule, options, "cpu", dtype, sizes=sizes)
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", RULES)
def test_the_bits_are_those_of_the_cpu_backend(rule, case, backend):
    assert_same_bits(rule, CASES[case], backend, torch.float32)


@pytest.mark.parametrize("case", ["gap and momentum", "compensation and displacement", "discrepancy"])
@pytest.mark.parametrize(("dtype", "moments"), DTYPES[1:], ids=str)
def test_in_every_dtype(dtype, moments, case, backend):
    assert_same_bits("AdamW", {**CASES[case], "state_dtype": moments}, backend, dtype)


def test_tensors_of_several_chunks(backend):
    assert_same_bits("NAdam", CASES["gap and momentum"], backend, torch.float32, [16_384, 17_001, 5])


def test_parameters_without_a_gradient_are_carried_and_clipping_goes_with_corrections(backend):
    results = []
    for name, device in ((backend, DEVICE), ("cpu", "cpu")):
        generator = torch.Generator().manual_seed(0)
        module = torch.nn.ParameterList([torch.randn(n, generator=generator) for n in LISTED]).to(device)
        stash = npp.WeightStash(module, 3, shadow="stepped")
        prediction = npp.optim.Prediction("momentum")
        options = {"correction": GapAware(), "prediction": prediction, "max_grad_norm": 0.5}
        optimizer = npp.NAdam(module.parameters(), stash=stash, backend=name, **options)
        for step in range(5):
            for i, p in enumerate(stash.parameters(stash.oldest).values()):
                g = torch.randn(p.shape, generator=generator)
                p.grad = None if (i + step) % 3 == 0 else g.to(device)
            optimizer.step(version=stash.oldest)
        results.append(
            [p.detach().cpu() for p in [*stash.weights().values(), *stash.parameters(stash.newest).values()]]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # the norm is summed in another order


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "rule", ["NAdam", *(pytest.param(rule, marks=pytest.mark.slow) for rule in RULES if rule != "NAdam")]
)
def test_counting_on_the_device_changes_nothing(rule, case, backend):
    ours, counted = run(rule, {**CASES[case], "capturable": True}, backend, torch.float32, sizes=LISTED, device=DEVICE)
    theirs, _ = run(rule, CASES[case], backend, torch.float32, sizes=LISTED, device=DEVICE)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **MANY_STEPS[torch.float32])
    for p in counted.param_groups[0]["params"]:
        assert float(counted.state[p]["step"]) == 6
        assert counted.state[p]["step"].device == p.device
