"""Real processes, stopped or killed at any moment, resume with the same losses."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nesterov_pp.cli import main
from nesterov_pp.training import checkpoint
from nesterov_pp.training.config import LATER
from nesterov_pp.training.metrics import microbatches_done

Start = Callable[..., "subprocess.Popen[str]"]


def wait_for_lines(process: subprocess.Popen[str], out: Path, microbatch: int) -> None:
    """Wait until the run has written the line of a microbatch."""
    while microbatches_done(out / "metrics.jsonl") < microbatch:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def losses(out: Path) -> bytes:
    return (out / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run 600 microbatches without any disturbance."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(["train", *tiny, "--microbatches", "600", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGTERM, "SIGTERM"), pytest.param(signal.SIGINT, "Ctrl-C", marks=pytest.mark.slow)]
)
def test_a_stopped_process_says_how_to_go_on_and_does(
    tiny: list[str], tmp_path: Path, start: Start, undisturbed: Path, number: int, word: str
) -> None:
    out = tmp_path / "run"
    process = start("train", *tiny, "--microbatches", "600", "--out", str(out))
    wait_for_lines(process, out, 30)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    (sentence,) = errors.splitlines()
    assert sentence.startswith(f"nesterov_pp: stopped by {word} after microbatch ")
    assert sentence.endswith(f"resume with: python -m nesterov_pp train --resume --out {out}")
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert losses(out) == losses(undisturbed)


def test_a_process_killed_at_any_moment_goes_on_bit_for_bit(
    tiny: list[str], tmp_path: Path, start: Start, undisturbed: Path
) -> None:
    """Write a checkpoint after every update, so that most kills arrive while one is being written."""
    out = tmp_path / "run"
    draw = random.Random(1)
    for target in (1, 40, 120):
        often = ["--checkpoint-every", "1", "--resume"]
        process = start("train", *tiny, "--microbatches", "600", "--out", str(out), *often)
        wait_for_lines(process, out, target)
        time.sleep(draw.uniform(0.0, 0.02))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert main(["train", "--resume", "--checkpoint-every", "500", "--out", str(out)]) == 0
    assert losses(out) == losses(undisturbed)


@pytest.mark.slow
def test_many_kills(tiny: list[str], tmp_path: Path, start: Start, undisturbed: Path) -> None:
    """Kill at moments drawn from the whole life of the process, including its start and end."""
    run = [*tiny, "--microbatches", "600", "--checkpoint-every", "5"]
    draw = random.Random(2)
    for k in range(6):
        out = tmp_path / f"run{k}"
        kills = 0
        while not (out / "summary.json").exists():
            process = start("train", *run, "--out", str(out), "--resume")
            try:
                process.wait(timeout=draw.uniform(1.0, 6.0 + kills))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
            else:
                assert process.returncode == 0, process.communicate()
        assert losses(out) == losses(undisturbed)


def test_a_run_from_before_the_settings_of_the_optimizer_goes_on(tiny: list[str], tmp_path: Path) -> None:
    """Its folder has the format of that time."""
    run = ["train", *tiny, "--microbatches", "60", "--checkpoint-every", "30"]
    assert main([*run, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "run"
    assert main([*run, "--out", str(out)]) == 0
    checkpoint.checkpoints(out)[-1].unlink()
    (out / "summary.json").unlink()
    (saved,) = checkpoint.checkpoints(out)
    state = checkpoint.load(saved)
    record = json.loads((out / "config.json").read_text())
    for settings in (state["record"]["config"], record["config"]):
        for name in LATER:
            del settings[name]
    torch.save(state, saved)
    (out / "config.json").write_text(json.dumps(record))
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert losses(out) == losses(tmp_path / "whole")
