"""Sharded parameters (FSDP2, tensor parallelism) in two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nesterov_pp as npp

WORKER = Path(__file__).with_name("dtensor_worker.py")
SCENARIOS = [
    "fsdp_nadam",
    "fsdp_nag",
    "fsdp_masters",
    "fsdp_small_state",
    "fsdp_small_state_saved",
    "fsdp_stochastic",
    "clipping",
    "tensor_parallel",
    "ring_of_shards",
    "refused_in_pipelines",
    "nonfinite",
    "grad_scaler",
    "sharded_grad_scaler",
    "gradient_placed_otherwise",
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> list[tuple[int, str]]:
    """Return exit status and output of both processes, which run all scenarios in one process group."""
    store = tmp_path_factory.mktemp("store") / "file"
    commands = [[sys.executable, str(WORKER), ",".join(SCENARIOS), str(rank), str(store)] for rank in range(2)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    results = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=180)
            results.append((process.returncode, output))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return results


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.skipif(npp.kernels.available_backends()["cpu"] is not None, reason="there is no compiled extension")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes(outputs, scenario):
    for _, output in outputs:
        assert f"passed {scenario}" in output, output
    assert [status for status, _ in outputs] == [0, 0]
