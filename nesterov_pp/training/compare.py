"""Several methods over several seeds, each run in a process of its own, and the table beside them."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from nesterov_pp.training import checkpoint, comparison, plots, report
from nesterov_pp.training.config import FREE, Config, RunError, UserError, differs, flag, settle
from nesterov_pp.training.data import read_text, tokenize
from nesterov_pp.training.folder import RunFolder, is_fresh, make_folder, read_object
from nesterov_pp.training.metrics import Curves, microbatches_done, read_curves
from nesterov_pp.training.signals import InterruptionError, StopRequest
from nesterov_pp.training.tokenizer import ByteTokenizer, check_text

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    config: Config
    folder: RunFolder

    @property
    def name(self) -> str:
        return f"{self.config.method} seed {self.config.seed}"

    @property
    def log(self) -> Path:
        """What the run's process prints."""
        return self.folder.path.with_suffix(".log")

    @property
    def finished(self) -> bool:
        return self.folder.summary.exists()

    def command(self) -> list[str]:
        where = ["--out", str(self.folder.path), "--resume"]
        return [sys.executable, "-m", "nesterov_pp", "train", *self.config.flags(), *where]


def compare(
    given: Mapping[str, Any],
    methods: Sequence[str],
    seeds: Sequence[int],
    jobs: int,
    out: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> None:
    """Train every method with every seed, ``jobs`` at a time, each on one thread unless ``given`` has ``threads``.

    Runs lie in ``out/METHOD/seed-N``. With ``resume``, finished runs are taken as they are and unfinished ones go on.

    Raises:
        UserError: a setting, the data or the folder is not usable; nothing has been started.
        RunError: runs have failed; the table of the others is there.
        InterruptionError: SIGINT or SIGTERM arrived; the runs have written checkpoints.
    """
    console = console or report.make_console()
    if given.get("data") is not None:
        given = {**given, "data": str(Path(given["data"]).resolve())}
    if not is_fresh(out) and not resume:
        raise UserError(f"{out} already holds something; add --resume to go on with it, or give another --out")
    # Seeds outside, so that every method has a run before any has its second.
    plan = [_job({**given, "method": m, "seed": s}, out) for s in seeds for m in methods]
    for job in plan:
        job.config.check()
    _check_data(plan[0].config)
    make_folder(out)
    waiting = [job for job in plan if not job.finished]
    console.print(
        f"{len(methods)} methods, {len(seeds)} seeds: {len(plan)} runs of {plan[0].config.microbatches} microbatches, "
        f"{jobs} at a time" + (f"; {len(plan) - len(waiting)} are finished." if len(waiting) < len(plan) else "."),
        soft_wrap=True,
    )
    failed = _run_all(waiting, jobs, out, console)
    finished = {m: [job for job in plan if job.config.method == m and job.finished] for m in methods}
    _report({m: runs for m, runs in finished.items() if runs}, out, console, [f"{j.name}: {r}" for j, r in failed])
    if failed:
        raise RunError("; ".join(f"{job.name} failed ({reason})" for job, reason in failed))


def _check_data(config: Config) -> None:
    """Raises: UserError: no run could train on it."""
    text = read_text(config.data)
    tokenize(text, ByteTokenizer(), config.context)
    if config.tokenizer == "bpe":
        check_text(text.train + text.validation)


def _job(given: Mapping[str, Any], out: Path) -> Job:
    """Raises: UserError: the run's folder holds a run with other settings."""
    folder = RunFolder(out / str(given["method"]) / f"seed-{given['seed']}")
    config = Config(**given)
    if folder.config.exists():
        there = settle({}, read_object(folder.config).get("config", {}))
        for name, value in vars(config).items():
            if name not in FREE and getattr(there, name) != value:
                raise UserError(f"{folder.path}: {differs(flag(name), getattr(there, name), value)}")
    return Job(config, folder)


def _run_all(waiting: Sequence[Job], jobs: int, out: Path, console: Console) -> list[tuple[Job, str]]:
    """Run them in order; returns those that failed, and why."""
    queue, running, failed = list(waiting), dict[subprocess.Popen[bytes], Job](), list[tuple[Job, str]]()
    progress = _Progress(console, waiting)
    try:
        with StopRequest() as stop:
            while queue or running:
                if stop.received is not None:
                    raise InterruptionError(
                        stop.received, f"stopped; the runs in {out} are kept: the same command with --resume goes on"
                    )
                while queue and len(running) < jobs:
                    job = queue.pop(0)
                    running[_start(job)] = job
                time.sleep(_POLL_SECONDS)
                progress.show(running.values())
                for process in [p for p in running if p.poll() is not None]:
                    job = running.pop(process)
                    reason = _reason(process.returncode, job)
                    progress.ended(job, reason)
                    if reason is not None:
                        failed.append((job, reason))
    finally:
        progress.close()
        _stop(list(running))
    return failed


def _start(job: Job) -> subprocess.Popen[bytes]:
    make_folder(job.folder.path.parent)
    threads = str(job.config.threads)
    # A session of its own: Ctrl-C reaches the run once, through this process.
    with job.log.open("ab") as log:
        return subprocess.Popen(
            job.command(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            start_new_session=True,
            preexec_fn=_die_with_parent() if sys.platform == "linux" else None,
        )


def _die_with_parent() -> Callable[[], None]:
    """Has the kernel send SIGTERM to a run whose comparison is killed."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    set_parent_death_signal = 1
    return lambda: prctl(set_parent_death_signal, int(signal.SIGTERM))


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Have runs write their checkpoints, and wait for them."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def _reason(status: int, job: Job) -> str | None:
    """Why a run's process ended without finishing; None if it did finish."""
    if status == 0 and job.finished:
        return None
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
    return lines[-1].removeprefix("nesterov_pp: error: ")


def _report(finished: Mapping[str, Sequence[Job]], out: Path, console: Console, failed: Sequence[str]) -> None:
    if not finished:
        return
    curves: dict[str, list[Curves]] = {m: [read_curves(j.folder.metrics) for j in js] for m, js in finished.items()}
    checkpoint.write_atomic(out / "compare.png", lambda file: plots.draw_comparison(file, curves))
    rows = [comparison.summarise([read_object(job.folder.summary) for job in runs]) for runs in finished.values()]
    sentence = comparison.sentence(rows)
    result = {"methods": rows, "comparison": sentence, "failed": list(failed)}
    checkpoint.write_text(out / "compare.json", json.dumps(result, indent=2) + "\n")
    checkpoint.write_text(out / "compare.md", comparison.markdown(rows, sentence))
    console.print(comparison.table(rows))
    if sentence:
        console.print(sentence, soft_wrap=True)
    console.print(f"Table and plot are in {out}: compare.md, compare.json, compare.png.", soft_wrap=True)


class _Progress:
    """One bar for all runs on a terminal; elsewhere a line for each run that ends."""

    def __init__(self, console: Console, waiting: Sequence[Job]) -> None:
        self._console = console
        self._done = {job: microbatches_done(job.folder.metrics) for job in waiting}
        self._total = sum(job.config.microbatches for job in waiting)
        self._first = sum(self._done.values())
        self._began = time.monotonic()
        self._bar = report.make_bar(console, self._total, self._first) if console.is_terminal else None

    def show(self, running: Any) -> None:
        for job in running:
            self._done[job] = microbatches_done(job.folder.metrics)
        if self._bar is not None:
            names = ", ".join(job.name for job in running)
            self._bar.update(self._bar.task_ids[0], completed=sum(self._done.values()), description=names)

    def ended(self, job: Job, reason: str | None) -> None:
        self._done[job] = job.config.microbatches
        if reason is not None:
            outcome = f"failed: {reason}"
        else:
            outcome = f"validation loss {read_object(job.folder.summary)['validation_loss']:.4f}"
        left = ""
        done = sum(self._done.values())
        if done > self._first:
            seconds = (time.monotonic() - self._began) / (done - self._first) * (self._total - done)
            left = f"  ({math.ceil(seconds / 6.0) / 10.0:.1f} min left)" if seconds > 0 else ""
        self._console.print(f"{job.name}: {outcome}{left}", soft_wrap=True, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
