"""The Triton kernels' machine code, compiled ahead of time: no GPU takes part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_to_wide_accesses_without_spills(capability, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(HERE / "compile_ahead.py"), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = {kernel["name"]: kernel for kernel in json.loads(done.stdout)}
    assert len(kernels) == 14
    for name, kernel in kernels.items():
        assert kernel["spills"] == 0, name
        assert kernel["stack"] == 0, name
        assert kernel["fused"] == 0, name
        assert kernel["registers"] <= 128, name
        if name != "scaling":
            assert kernel["loads_128"] > 0, name
    for name in kernels.keys() - {"scaling", "squares"}:
        assert kernels[name]["stores_128"] >= 3, name
    assert kernels["float32"]["loads_128"] >= 4
    assert kernels["corrected: gap"]["loads_128"] >= 6
