"""Helpers that start the processes of a pipeline, as torchrun would, and never leave one behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **{k: str(v) for k, v in place.items()}, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def start(command: Sequence[str], size: int, port: int | None = None) -> list[subprocess.Popen[str]]:
    """Start ``python command`` as processes 0 ... size - 1."""
    port = free_port() if port is None else port
    return [
        subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(rank, size, port),
        )
        for rank in range(size)
    ]


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float) -> list[tuple[int, str]]:
    """Wait for the processes and return the exit status and output of each; none is left running afterwards.

    Raises:
        subprocess.TimeoutExpired: a process hangs.
    """
    results = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=timeout)
            results.append((process.returncode, output))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return results
