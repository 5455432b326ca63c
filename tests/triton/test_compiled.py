"""The machine code of the Triton kernels, compiled ahead of time; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent


NEW_ASSEMBLER = triton.__version__ >= "3.9"
"""Older ones take up to 5 % more instructions, and more registers for corrected steps."""
# Instructions of the usual loop per parameter: without an L2 term, and where every root and quotient is sure.
INSTRUCTIONS = {
    "float32": 40,
    "float32, no second moment": 17,
    "bfloat16": 44,
    "bfloat16, rounded stochastically": 67,
    "float16": 48,
    "float32 masters of bfloat16": 52,
}
ONE_MOMENT = {"float32, no second moment", "float32, sign"}
FUSED = 2 * 8 * 6  # in the loops with and without an L2 term, for each of a thread's elements: root 2, quotient 4


@pytest.fixture(
    scope="module", params=[pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
)
def compiled(request, tmp_path_factory) -> tuple[int, str]:
    """Compile for a capability; return it and what the compilation prints."""
    capability: int = request.param
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp(f"cache{capability}"))
    command = [sys.executable, str(HERE / "compile_ahead.py"), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return capability, done.stdout


def test_kernels_compile_to_wide_accesses_without_spills(compiled):
    capability, printed = compiled
    kernels = {kernel["name"]: kernel for kernel in json.loads(printed)}
    assert len(kernels) == 18
    for name, kernel in kernels.items():
        assert kernel["spills"] == 0, name
        assert kernel["stack"] == 0, name
        estimates = name not in ONE_MOMENT | {"float64", "squares", "scaling"} and "corrected" not in name
        assert kernel["fused"] == (FUSED if estimates else 0), name
        # 152: three blocks of 128 threads on a multiprocessor, as with 144
        if NEW_ASSEMBLER:
            assert kernel["registers"] <= (152 if "corrected" in name and "stochastic" in name else 128), name
        if name != "scaling":
            assert kernel["loads_128"] > 0, name
    for name in kernels.keys() - {"scaling", "squares"}:
        assert kernels[name]["stores_128"] >= (2 if name in ONE_MOMENT else 3), name
    assert kernels["float32"]["loads_128"] >= 4
    if capability == 90 and NEW_ASSEMBLER:
        for name, most in INSTRUCTIONS.items():
            assert 0 < kernels[name]["loop"] <= most, name
    assert kernels["corrected: gap"]["loads_128"] >= 6
