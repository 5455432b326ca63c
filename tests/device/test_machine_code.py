"""The CUDA kernels' machine code for three generations of GPUs; no GPU takes part."""

from __future__ import annotations

import pytest

from benchmarks.machine_code import (
    ARCHITECTURES,
    MissingToolError,
    check_host_code,
    compile_kernels,
    cuobjdump,
    kernels_of,
    nvcc,
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    try:
        nvcc()
        cuobjdump()
    except MissingToolError as reason:
        pytest.skip(str(reason))
    return kernels_of(compile_kernels(tmp_path_factory.mktemp("cuda")))


def test_every_pass_is_there_for_every_architecture(kernels):
    names = {kernel.name for kernel in kernels}
    assert {k.architecture for k in kernels} == set(ARCHITECTURES)
    assert len(kernels) == len(names) * len(ARCHITECTURES)
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        assert f"step: {dtype}" in names
        assert f"squares: {dtype}" in names
    assert "step: bfloat16, stochastic rounding" in names
    assert "step: float32 weights, bfloat16 gradients, float32 moments" in names
    assert "step: float32, no second moment" in names
    assert "corrected, gap: float32" in names
    assert sum(name.startswith("corrected") for name in names) == 50


def test_nothing_is_spilled_and_registers_keep_to_the_bound(kernels):
    for kernel in kernels:
        few = "float16" not in kernel.name and "float64" not in kernel.name and "stochastic" not in kernel.name
        few = few and not kernel.name.startswith("corrected")
        bound = 64 if few or not kernel.name.startswith(("step", "corrected")) else 128
        assert kernel.spills == 0, kernel
        assert kernel.stack == 0, kernel
        assert kernel.registers <= bound, kernel


def test_every_stream_is_read_and_written_128_bits_at_a_time(kernels):
    for kernel in kernels:
        if kernel.name.startswith("step"):
            adaptive = "no second moment" not in kernel.name
            # w, g, m and v are read, w, m and v written.
            assert kernel.loads_128 >= 3 + adaptive, kernel
            assert kernel.stores_128 >= 2 + adaptive, kernel
        elif kernel.name.startswith("corrected"):
            adaptive = "no second moment" not in kernel.name
            compares = any(f"{kind}:" in kernel.name for kind in ("compensated", "compensated adaptively", "gap"))
            mean = any(f"{kind}:" in kernel.name for kind in ("compensated adaptively", "gap", "discrepancy"))
            # The late weights and a running mean are read too, the mean and what is predicted written.
            assert kernel.loads_128 >= 3 + adaptive + compares + mean, kernel
            assert kernel.stores_128 >= 3 + adaptive + mean, kernel
        elif kernel.name.startswith("squares"):
            assert kernel.loads_128 >= 1, kernel


def test_the_code_that_launches_them_compiles(tmp_path):
    try:
        check_host_code(tmp_path)
    except MissingToolError as reason:
        pytest.skip(str(reason))
