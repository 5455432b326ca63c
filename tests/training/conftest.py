"""A small text, flags for a small model, and a fixture that runs the command line."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 20 kB of lines that a model can learn something from."""
    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "stage", "weight", "late", "gradient"]
    lines = [" ".join(draw.choices(words, k=8)) for _ in range(400)]
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny(text_file: Path) -> list[str]:
    """Return the flags of a run that takes a second."""
    model = ["--stages", "2", "--layers", "3", "--width", "16", "--heads", "2", "--context", "16", "--batch", "4"]
    run = ["--warmup", "5", "--eval-every", "20", "--eval-batches", "2", "--sample-length", "8"]
    return ["--data", str(text_file), *model, *run]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start ``python -m nesterov_pp`` with arguments; kill processes that still run at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "nesterov_pp", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Restore the number of threads, which a run sets, for other tests."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
