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
    "float32": 38,
    "float32, no second moment": 16,
    "bfloat16": 42,
    "bfloat16, rounded stochastically": 66,
    "float16": 44,
    "float32 masters of bfloat16": 49,
    "8 bits: float32": 79,
    "8 bits: float32, no second moment": 42,
    "8 bits: bfloat16": 78,
    "8 bits: bfloat16, rounded stochastically": 99,
    "8 and 24 bits": 94,
    "24 bits": 62,
    "24 bits, bfloat16 moments": 57,
    "encode differences: float32": 25,
}
ONE_MOMENT = {"float32, no second moment", "float32, sign"}
FUSED = 2 * 8 * 6  # in the usual and the other loop, for each of a thread's elements: root 2, quotient 4
# In these and the loops over tails, from codes and to codes, the latter twice where a block may be unsure: for each
# element of m a quotient (2 and 4), of v 1 and 1, and for a group of v a quotient (4).
CODED_FUSED = FUSED + 4 * 8 * (2 + 1) + 6 * (8 * (4 + 1) + 4)
CODED_ONE_MOMENT_FUSED = 4 * 8 * (2 + 4)


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


def fused_in(name: str) -> int:
    """Return how many additions are fused with multiplications: in estimated roots and quotients, and in codes."""
    if name[0] == "8":
        return CODED_ONE_MOMENT_FUSED if name.removeprefix("8 bits: ") in ONE_MOMENT else CODED_FUSED
    exact = name in ONE_MOMENT | {"float64", "squares", "scaling"} or "corrected" in name or "differences" in name
    return 0 if exact else FUSED


def most_registers(name: str) -> int:
    if name[0] == "8":
        return 144
    return 152 if "corrected" in name and "stochastic" in name else 128


def test_kernels_compile_to_wide_accesses_without_spills(compiled):
    capability, printed = compiled
    kernels = {kernel["name"]: kernel for kernel in json.loads(printed)}
    assert len(kernels) == 31
    for name, kernel in kernels.items():
        assert kernel["spills"] == 0, name
        assert kernel["stack"] == 0, name
        assert kernel["fused"] == fused_in(name), name
        # 152: three blocks of 128 threads on a multiprocessor, as with 144
        if NEW_ASSEMBLER:
            assert kernel["registers"] <= most_registers(name), name
        if name != "scaling":
            assert kernel["loads_128"] > 0, name
    for name in kernels.keys() - {"scaling", "squares"}:
        if "differences" not in name:
            assert kernels[name]["stores_128"] >= (2 if name in ONE_MOMENT or name[0] == "8" else 3), name
    assert kernels["float32"]["loads_128"] >= 4
    if capability == 90 and NEW_ASSEMBLER:
        for name, most in INSTRUCTIONS.items():
            assert 0 < kernels[name]["loop"] <= most, name
    assert kernels["corrected: gap"]["loads_128"] >= 6
