"""The build's choice of CUDA, and the line that it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def version(**environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k != "NPP_CUDA"}
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**variables, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("nesterov_pp")]


def test_cuda_left_out_on_request_is_one_line():
    done = version(NPP_CUDA="0")
    assert done.returncode == 0
    assert said(done) == ["nesterov_pp is built without CUDA kernels: NPP_CUDA=0"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_is_one_line_or_an_error_where_cuda_is_asked_for():
    done = version()
    assert done.returncode == 0
    assert said(done) == [f"nesterov_pp is built without CUDA kernels: torch {torch.__version__} has no CUDA"]
    done = version(NPP_CUDA="1")
    assert done.returncode == 1
    assert said(done) == [
        f"nesterov_pp cannot be built with CUDA, as NPP_CUDA=1 asks: torch {torch.__version__} has no CUDA"
    ]


# Make the choice with a torch that claims to have CUDA, without building anything.
CHOOSING = """
import runpy, sys, torch
torch.version.cuda = "1.0"
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py")
"""


def test_a_toolkit_of_another_generation_than_torchs_is_one_line(tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin" / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    compiler.chmod(0o755)
    environment = {**os.environ, "CUDA_HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    for wanted, begin in (
        ("", "is built without CUDA kernels: "),
        ("1", "cannot be built with CUDA, as NPP_CUDA=1 asks: "),
    ):
        done = subprocess.run(
            [sys.executable, "-c", CHOOSING],
            cwd=ROOT,
            env={**environment, "NPP_CUDA": wanted},
            capture_output=True,
            text=True,
            check=False,
        )
        why = f"torch {torch.__version__} has CUDA 1.0, but the toolkit in {tmp_path} is 13.0"
        assert said(done) == [f"nesterov_pp {begin}{why}"]
        assert done.returncode == (wanted == "1")
