"""The command line under torchrun: its losses equal those of one process, whatever happens to the processes."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from launch import ROOT, environment, finish, free_port, start

from nesterov_pp.cli import main
from nesterov_pp.training import checkpoint
from nesterov_pp.training.metrics import microbatches_done

STAGES = 4
Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def run(text_file: Path) -> list[str]:
    """Return the flags of a run with all that could break a replay: dropout, clipping, drains, parameter groups."""
    model = ["--layers", "4", "--width", "16", "--heads", "2", "--context", "16", "--batch", "4", "--dropout", "0.1"]
    rest = ["--warmup", "5", "--eval-every", "50", "--eval-batches", "2", "--sample-length", "8", "--timeout", "30"]
    return [
        "--data",
        str(text_file),
        *model,
        *rest,
        "--max-grad-norm",
        "1",
        "--flush-every",
        "70",
        "--embedding-lr",
        "3",
    ]


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Start ``torchrun -m nesterov_pp train``; no started process outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def run(
        *arguments: str, processes: int = STAGES, restarts: int = 0, together: Sequence[str] = ()
    ) -> subprocess.Popen[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        launcher += together or ["--master-port", str(free_port())]
        launcher += ["--max-restarts", str(restarts), "-m", "nesterov_pp", "train"]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [*launcher, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        )
        started.append(process)
        return process

    yield run
    for process in started:
        left = workers(process)
        process.kill()
        process.communicate()
        for pid in left:
            kill(pid)


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_for(process: subprocess.Popen[str], out: Path, microbatch: int) -> None:
    while microbatches_done(out / "metrics.jsonl") < microbatch:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def weights(out: Path) -> list[dict[str, torch.Tensor]]:
    """Return the final weights of all stages from the checkpoints of a run in one process or in several."""
    marks = [""] if checkpoint.checkpoints(out) else [f".stage-{k}-of-{STAGES}" for k in range(1, STAGES + 1)]
    files = [checkpoint.load(checkpoint.checkpoints(out, mark)[-1]) for mark in marks]
    stages = {i: stage for file in files for i, stage in file["pipeline"]["stages"].items()}
    return [stages[i]["stash"]["weights"][-1] for i in range(STAGES)]


def assert_same(found: Path, wanted: Path) -> None:
    for name in ("metrics.jsonl", "sample.txt"):
        assert (found / name).read_bytes() == (wanted / name).read_bytes()
    for ours, theirs in zip(weights(found), weights(wanted), strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def undisturbed(run: list[str], folder: Path, *more: str) -> Path:
    """Run the same training in one process."""
    assert main(["train", *run, *more, "--stages", str(STAGES), "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("method", "stash", "kills"),
    [
        ("nesterov", "full", [60]),
        ("nesterov", "8bit-differences", [60]),
        *(pytest.param(m, "full", [30, 100], marks=pytest.mark.slow) for m in ("nesterov", "nesterov-no-stash")),
    ],
)
def test_killed_processes_come_back_and_nothing_changes(
    run: list[str], tmp_path: Path, launch: Launch, method: str, stash: str, kills: list[int]
) -> None:
    """Write a checkpoint after every update, so that most kills arrive while one is being written."""
    draw = random.Random(3)
    more = ["--microbatches", "180", "--method", method, "--stash", stash]
    out = tmp_path / "run"
    process = launch(*run, *more, "--checkpoint-every", "1", "--out", str(out), restarts=2)
    for microbatch in kills:
        wait_for(process, out, microbatch)
        time.sleep(draw.uniform(0.0, 0.05))
        kill(draw.choice(workers(process)))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert_same(out, undisturbed(run, tmp_path / "alone", *more))


@pytest.mark.slow
def test_thirty_kills_at_random_moments(run: list[str], tmp_path: Path, launch: Launch) -> None:
    """Kill at any moment of a process's life, from its first import to its last file, in as many runs as it takes."""
    draw = random.Random(4)
    more = ["--microbatches", "1500"]
    wanted = undisturbed(run, tmp_path / "alone", *more)
    kills, runs = 0, 0
    while kills < 30:
        out = tmp_path / f"run-{runs}"
        runs += 1
        process = launch(*run, *more, "--checkpoint-every", "7", "--out", str(out), restarts=40)
        while kills < 30 and process.poll() is None:
            time.sleep(draw.uniform(1.0, 15.0))
            for pid in draw.sample(alive, 1) if (alive := workers(process)) else []:
                kill(pid)
                kills += 1
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
        assert_same(out, wanted)


@pytest.mark.slow
def test_two_launchers_as_on_two_machines(run: list[str], tmp_path: Path, launch: Launch) -> None:
    """When a process of one launcher is killed, both restart theirs, although only one counts a restart."""
    out, more = tmp_path / "run", ["--microbatches", "300"]
    together = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    arguments = [*run, *more, "--checkpoint-every", "3", "--out", str(out)]
    pair = [launch(*arguments, processes=STAGES // 2, restarts=3, together=together) for _ in range(2)]
    wait_for(pair[1], out, 60)
    kill(workers(pair[1])[0])
    outputs = [process.communicate(timeout=180)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], "".join(outputs)
    assert_same(out, undisturbed(run, tmp_path / "alone", *more))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_launcher_leaves_a_checkpoint_to_go_on_from(
    run: list[str], tmp_path: Path, launch: Launch, number: int
) -> None:
    out = tmp_path / "run"
    more = ["--microbatches", "400", "--method", "nesterov-no-stash"]
    process = launch(*run, *more, "--out", str(out))
    wait_for(process, out, 40)
    begin = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - begin < 30.0
    assert process.returncode != 0
    assert f"resume with: torchrun --nproc-per-node {STAGES} -m nesterov_pp train --resume --out {out}" in output
    assert workers(process) == []
    process = launch("--resume", "--out", str(out))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert_same(out, undisturbed(run, tmp_path / "alone", *more))


def alone(rank: int, size: int, port: int, *arguments: str, timeout: float = 60.0) -> tuple[int, str, float]:
    """Run one process of ``size`` without the others; return exit status, output and seconds."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "nesterov_pp", "train", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(rank, size, port),
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - begin


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_missing_process_is_named_in_time(run: list[str], tmp_path: Path, rank: int) -> None:
    arguments = [*run, "--timeout", "3", "--out", str(tmp_path / "run")]
    status, output, seconds = alone(rank, 2, free_port(), *arguments)
    assert status == 1
    assert seconds < 30.0
    (sentence,) = [line for line in output.splitlines() if line.startswith("nesterov_pp: ")]
    wanted = (
        "process 0 timed out after 3 s waiting for process 1 of 2",
        "process 1 of 2 found no process at 127.0.0.1:",
    )[rank]
    assert wanted in sentence
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_named(run: list[str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, output, _ = alone(0, 2, port, *run, "--timeout", "3", "--out", str(tmp_path / "run"))
    assert status == 1
    assert f"cannot listen on port {port}" in output
    assert "choose another with --master-port" in output


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--stages", "3"], "--stages 3 needs 3 processes, but torchrun has started 2; omit --stages"),
        (["--diagnostics", "5"], "--diagnostics needs all stages in one process"),
        pytest.param(["--layers", "1"], "1 layers cannot fill 2 stages", marks=pytest.mark.slow),
        pytest.param(["--replicas", "3"], "2 processes cannot be divided into 3 replicas", marks=pytest.mark.slow),
        pytest.param(["--method", "adam"], "unknown method 'adam'; choose one of", marks=pytest.mark.slow),
    ],
)
def test_bad_settings_end_all_processes(run: list[str], tmp_path: Path, flags: list[str], sentence: str) -> None:
    command = ["-m", "nesterov_pp", "train", *run, *flags, "--out", str(tmp_path / "run")]
    results = finish(start(command, 2), timeout=60)
    assert [status for status, _ in results] in ([1, 1], [2, 2])
    lines = [line for _, output in results for line in output.splitlines() if line.startswith("nesterov_pp: error: ")]
    assert lines
    assert all(sentence in line for line in lines)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_all(run: list[str], tmp_path: Path) -> None:
    command = ["-m", "nesterov_pp", "train", *run, "--microbatches", "300", "--lr", "1e30"]
    results = finish(start([*command, "--out", str(tmp_path / "run")], 3), timeout=60)
    assert [status for status, _ in results] == [1, 1, 1]
    first = [line for _, output in results for line in output.splitlines() if "another process stopped" not in line]
    assert any(re.search(r"(is not finite|is (nan|inf)) at microbatch \d+, on stage [012]", line) for line in first)


def test_a_run_of_another_number_of_processes_is_refused(run: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["train", *run, "--stages", "2", "--microbatches", "40", "--out", str(out)]) == 0
    before = {p: p.read_bytes() for p in out.iterdir() if p.is_file()}
    results = finish(start(["-m", "nesterov_pp", "train", "--resume", "--out", str(out)], 2), timeout=60)
    assert [status for status, _ in results] == [2, 2]
    sentence = f"has 1 process(es), not 2; resume with: python -m nesterov_pp train --resume --out {out}"
    assert any(sentence in output for _, output in results)
    assert {p: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


@pytest.mark.slow
def test_two_replicas_of_two_stages(run: list[str], tmp_path: Path, launch: Launch) -> None:
    out = tmp_path / "run"
    process = launch(*run, "--microbatches", "60", "--replicas", "2", "--out", str(out), processes=4)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    assert microbatches_done(out / "metrics.jsonl") == 60
    assert "Delays of the stages, in updates: 1 0" in output
