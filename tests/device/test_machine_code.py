"""The machine code of the CUDA kernels; no GPU is needed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import corrected_steps
from benchmarks.machine_code import (
    ARCHITECTURES,
    Kernel,
    MissingToolError,
    check_host_code,
    compile_kernels,
    corrected_uses,
    cuobjdump,
    kernels_of,
    nvcc,
    problems,
)


@pytest.mark.parametrize("architectures", [(90,), pytest.param(ARCHITECTURES, marks=pytest.mark.slow)])
def test_every_pass_is_there_and_moves_128_bits_at_a_time_without_spills(tmp_path, architectures):
    try:
        nvcc()
        cuobjdump()
    except MissingToolError as reason:
        pytest.skip(str(reason))
    kernels = kernels_of(compile_kernels(tmp_path, architectures), architectures)
    assert problems(kernels) == []
    assert corrected_steps.problems(corrected_uses(tmp_path)) == []
    names = {kernel.name for kernel in kernels}
    assert {k.architecture for k in kernels} == set(architectures)
    assert len(kernels) == len(names) * len(architectures)
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        assert f"step: {dtype}" in names
        assert f"squares: {dtype}" in names
    assert "step: bfloat16, stochastic rounding" in names
    assert "step: float32 weights, bfloat16 gradients, float32 moments" in names
    assert "step: 24-bit weights, bfloat16 gradients, 8-bit moments" in names
    assert "step, no second moment: float32" in names
    assert "step, sign: float32" in names
    assert "corrected step: float32" in names
    for start, count in {
        "step:": 27,
        "step, no second moment:": 27,
        "step, sign:": 27,
        "corrected step:": 17,
        "squares": 4,
        "scaling": 1,
    }.items():
        assert sum(name.startswith(start) for name in names) == count


def kernel(name: str, **changes: int) -> Kernel:
    right = Kernel(90, name, registers=64, stack=0, instructions=500, loads_128=9, stores_128=7, spills=0)
    return replace(right, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("step: float32", {"registers": 65}, "takes 65 registers of 64"),
        ("step: bfloat16 weights, bfloat16 gradients, 8-bit moments", {"registers": 65}, "takes 65 registers of 64"),
        (
            "step: bfloat16 weights, bfloat16 gradients, 8-bit moments",
            {"loads_128": 1},
            "loads 128 bits 1 times instead of 2 or more",
        ),
        ("step: float16", {"registers": 81}, "takes 81 registers of 80"),
        ("step: bfloat16, stochastic rounding", {"registers": 81}, "takes 81 registers of 80"),
        ("corrected step: float32", {"registers": 81}, "takes 81 registers of 80"),
        ("step: float64", {"registers": 129}, "takes 129 registers of 128"),
        ("squares: float64", {"registers": 65}, "takes 65 registers of 64"),
        ("step: float32", {"spills": 2}, "spills registers (2 times)"),
        ("scaling", {"stack": 8}, "keeps 8 bytes on the stack"),
        ("step: bfloat16", {"loads_128": 8}, "loads 128 bits 8 times instead of 9 or more"),
        ("step, no second moment: bfloat16", {"stores_128": 4}, "stores 128 bits 4 times instead of 5 or more"),
        (
            "step: float32 weights, bfloat16 gradients, float32 moments",
            {"loads_128": 6},
            "loads 128 bits 6 times instead of 7 or more",
        ),
        ("corrected step: float32", {"loads_128": 6}, "loads 128 bits 6 times instead of 7 or more"),
        ("corrected step: float32", {"stores_128": 5}, "stores 128 bits 5 times instead of 6 or more"),
        ("squares: float32", {"loads_128": 0}, "loads 128 bits 0 times instead of 1 or more"),
    ],
)
def test_what_is_wrong_with_a_kernel_is_said(name, changes, sentence):
    assert problems([kernel(name), kernel(name, **changes)]) == [f"{name} on sm_90 {sentence}"]


@pytest.mark.slow  # `make cuda-build` does it too
def test_the_code_that_launches_them_compiles(tmp_path):
    try:
        check_host_code(tmp_path)
    except MissingToolError as reason:
        pytest.skip(str(reason))
