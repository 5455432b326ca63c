"""Backends and instruction sets compared with each other, and the contracts of the operators."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from backends import BACKENDS, WHY_NOT
from tolerances import ONE_STEP

import nesterov_pp as npp
from nesterov_pp.kernels import Coefficients, extension

C, REASON = extension.load()
needs_extension = pytest.mark.skipif(C is None, reason=str(REASON))
ROW = Coefficients(0.5, 0.1, 0.1, 0.01, 0.02, 0.3, 0.7, 1.5, 1e-8)
SIZES = [0, 1, 2, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1000, 4097, 70_001]


def lists(dtype: torch.dtype, sizes: list[int] = SIZES) -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[torch.Tensor]:
        return [torch.randn(n, generator=generator, dtype=dtype) for n in sizes]

    return {"weights": draw(), "grads": draw(), "exp_avgs": draw(), "exp_avg_sqs": [v.abs() + 0.1 for v in draw()]}


def reference(t: dict[str, list[torch.Tensor]], adaptive: bool) -> list[torch.Tensor]:
    out = [w.clone() for w in t["weights"]]
    for i, w in enumerate(t["weights"]):
        npp.kernels.reference.update(
            w, out[i], t["grads"][i], t["exp_avgs"][i], t["exp_avg_sqs"][i] if adaptive else None, ROW
        )
    return out


@needs_extension
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("into", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_equal_the_reference(dtype, into, adaptive):
    ours, theirs = lists(dtype), lists(dtype)
    before = [w.clone() for w in ours["weights"]]
    out = [torch.full_like(w, torch.nan) for w in before] if into else ours["weights"]
    tensors = [ours["grads"], ours["exp_avgs"], ours["exp_avg_sqs"] if adaptive else []]
    rows, row_of = torch.tensor([ROW], dtype=torch.float64), [0] * len(SIZES)
    if into:
        torch.ops.nesterov_pp.step_into(ours["weights"], out, *tensors, rows, row_of)
        assert all(torch.equal(w, b) for w, b in zip(ours["weights"], before, strict=True))
    else:
        torch.ops.nesterov_pp.step_(ours["weights"], *tensors, rows, row_of)
    expected = reference(theirs, adaptive)
    torch.testing.assert_close(out, expected, **ONE_STEP[dtype])
    torch.testing.assert_close(ours["exp_avgs"], theirs["exp_avgs"], **ONE_STEP[dtype])
    torch.testing.assert_close(ours["exp_avg_sqs"], theirs["exp_avg_sqs"], **ONE_STEP[dtype])


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operator", ["step_", "step_into"])
def test_opcheck(operator, dtype):
    t = lists(dtype, [3, 17])
    out = [[torch.zeros_like(w) for w in t["weights"]]] if operator == "step_into" else []
    arguments = (t["weights"], *out, t["grads"], t["exp_avgs"], t["exp_avg_sqs"])
    torch.library.opcheck(
        getattr(torch.ops.nesterov_pp, operator).default,
        (*arguments, torch.tensor([ROW], dtype=torch.float64), [0, 0]),
    )


@needs_extension
@pytest.mark.parametrize("operator", ["step_", "step_into"])
def test_operators_compile(operator):
    eager, compiled = lists(torch.float32), lists(torch.float32)
    rows, row_of = torch.tensor([ROW], dtype=torch.float64), [0] * len(SIZES)

    def run(t: dict[str, list[torch.Tensor]]) -> list[torch.Tensor]:
        out = [torch.zeros_like(w) for w in t["weights"]]
        into = [out] if operator == "step_into" else []
        getattr(torch.ops.nesterov_pp, operator)(
            t["weights"], *into, t["grads"], t["exp_avgs"], t["exp_avg_sqs"], rows, row_of
        )
        return [a + b for a, b in zip(t["weights"], out, strict=True)]

    expected = run(eager)
    got = torch.compile(run, backend="aot_eager", fullgraph=True)(compiled)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set_gives_the_same_bits(dtype):
    results = {}
    selected = C.isa()
    try:
        for isa in C.isas():
            C.set_isa(isa)
            t = lists(dtype)
            out = [torch.empty_like(w) for w in t["weights"]]
            rows = torch.tensor([ROW], dtype=torch.float64)
            torch.ops.nesterov_pp.step_into(
                t["weights"], out, t["grads"], t["exp_avgs"], t["exp_avg_sqs"], rows, [0] * len(SIZES)
            )
            results[isa] = [*out, *t["exp_avgs"], *t["exp_avg_sqs"]]
    finally:
        C.set_isa(selected)
    first = results.pop("baseline")
    for isa, tensors in results.items():
        assert all(torch.equal(a, b) for a, b in zip(first, tensors, strict=True)), isa
    with pytest.raises(ValueError, match="choose one of: baseline"):
        C.set_isa("avx1024")


@needs_extension
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_threads_streaming_and_alignment_change_nothing(threads, offset):
    """A new version that is large enough to be streamed past the caches has the same bits as an in-place step on one
    thread, also at addresses that are not 16-byte aligned."""
    sizes = [1 << 20, 1_500_001, 7, 64]
    rows, row_of = torch.tensor([ROW], dtype=torch.float64), [0] * len(sizes)
    t, alone = lists(torch.float32, sizes), lists(torch.float32, sizes)
    out = [torch.full((n + offset,), torch.nan)[offset:] for n in sizes]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        torch.ops.nesterov_pp.step_into(t["weights"], out, t["grads"], t["exp_avgs"], t["exp_avg_sqs"], rows, row_of)
        torch.set_num_threads(1)
        torch.ops.nesterov_pp.step_(
            alone["weights"], alone["grads"], alone["exp_avgs"], alone["exp_avg_sqs"], rows, row_of
        )
    finally:
        torch.set_num_threads(before)
    for ours, expected in ((out, alone["weights"]), (t["exp_avg_sqs"], alone["exp_avg_sqs"])):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@needs_extension
def test_operators_refuse_what_does_not_fit_and_write_nothing():
    t = lists(torch.float32, [4, 4])
    rows = torch.tensor([ROW], dtype=torch.float64)
    cases = [
        ({"grads": [t["grads"][0], torch.zeros(5)]}, rows, "gradient of parameter 1 has shape"),
        ({"grads": [t["grads"][0], torch.zeros(4, dtype=torch.float64)]}, rows, "gradient of parameter 1 is"),
        ({"weights": [t["weights"][0], torch.zeros(1).expand(4)]}, rows, "dense tensors without overlap"),
        ({"exp_avgs": t["exp_avgs"][:1]}, rows, "differ in length"),
        ({}, rows.float(), "float64 CPU tensor of shape"),
        ({}, rows[:0], "takes row 0, but there are 0 rows of coefficients"),
    ]
    before = t["weights"][0].clone()
    for changed, coefficients, sentence in cases:
        a = {**t, **changed}
        with pytest.raises((ValueError, RuntimeError), match=sentence):
            torch.ops.nesterov_pp.step_(a["weights"], a["grads"], a["exp_avgs"], a["exp_avg_sqs"], coefficients, [0, 0])
        assert torch.equal(t["weights"][0], before)


@pytest.mark.parametrize("backend", WHY_NOT)
def test_the_numerical_tests_run_over_every_backend_that_is_here(backend):
    if backend not in BACKENDS:
        pytest.skip(f"no numerical test runs over {backend}: {WHY_NOT[backend]}")
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = npp.NAdam([p], backend=backend)
    optimizer.step()
    assert optimizer.backend == backend
    assert p.is_cuda == (torch.cuda.is_available() and backend in ("triton", "cuda"))


def test_auto_takes_the_fastest_backend_that_fits():
    def backend_of(p: torch.Tensor) -> str:
        return npp.NAdam([torch.nn.Parameter(p)]).backend

    assert backend_of(torch.ones(3)) == ("cpu" if C is not None else "reference")
    assert backend_of(torch.ones(3, dtype=torch.bfloat16)) == ("cpu" if C is not None else "reference")
    assert backend_of(torch.ones(6)[::2]) == "reference"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_computes_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(100, generator=generator).to(dtype)
    g = torch.randn(100, generator=generator).to(dtype)
    m, v, out = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    npp.kernels.reference.update(w, out, g, m, v, ROW)
    exact = torch.zeros(100)
    npp.kernels.reference.update(w.float(), exact, g.float(), torch.zeros(100), torch.zeros(100), ROW)
    assert torch.equal(out, exact.to(dtype))


def test_a_step_on_the_cpu_imports_no_kernels_for_devices():
    code = (
        "import sys, torch, nesterov_pp as npp; p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3); "
        "npp.NAdam([p]).step(); sys.exit('nesterov_pp.triton_kernels' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_import_leaves_slow_modules_to_those_who_use_them():
    """The import takes hardly longer than that of torch, whose first optimizer imports the compiler in any case."""
    slow = {"torch._dynamo", "torch.distributed.tensor", "torch.distributed.pipelining", "sympy", "scipy", "triton"}
    code = f"import sys, nesterov_pp.training.distributed, nesterov_pp.cli; sys.exit(str({slow} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stderr.strip() == "set()"
