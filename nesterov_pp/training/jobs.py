"""Training runs in their own processes, several at a time, with one display of their progress."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from nesterov_pp.terminal import say
from nesterov_pp.training import report
from nesterov_pp.training.config import Config
from nesterov_pp.training.folder import RunFolder, make_folder
from nesterov_pp.training.metrics import microbatches_done
from nesterov_pp.training.signals import InterruptionError, StopRequest

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    config: Config
    folder: RunFolder

    several_rates: bool = False
    several_depths: bool = False

    @property
    def name(self) -> str:
        rate = f" lr {self.config.lr:g}" if self.several_rates else ""
        depth = f" {self.config.stages} stages" if self.several_depths else ""
        return f"{self.config.method} seed {self.config.seed}{rate}{depth}"

    @property
    def log(self) -> Path:
        """The file that the run's process prints to."""
        return self.folder.path.with_suffix(".log")

    @property
    def finished(self) -> bool:
        return self.folder.summary.exists()

    def command(self) -> list[str]:
        where = ["--out", str(self.folder.path), "--resume"]
        return [sys.executable, "-m", "nesterov_pp", "train", *self.config.flags(), *where]


def run_all(
    first: Sequence[Job], then: Callable[[], Sequence[Job]], count: int, jobs: int, out: Path, console: Console
) -> list[tuple[Job, str]]:
    """Run the unfinished jobs of ``first`` in order, then those of ``then()``; return the jobs that failed, and why.

    ``count`` is the number of jobs in both together.
    """
    queue, running, failed = _unfinished(first), dict[subprocess.Popen[bytes], Job](), list[tuple[Job, str]]()
    progress = _Progress(console, queue, (count - len(first)) * first[0].config.microbatches)
    more = True
    try:
        with StopRequest() as stop:
            while queue or running or more:
                if not queue and not running:
                    more, queue = False, _unfinished(then())
                    progress.expect(queue)
                if stop.received is not None:
                    raise InterruptionError(
                        stop.received,
                        f"stopped; the runs in {out} are kept, and the same command with --resume continues them",
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


def _unfinished(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if not job.finished]


def _start(job: Job) -> subprocess.Popen[bytes]:
    make_folder(job.folder.path.parent)
    threads = str(job.config.threads)
    # In a session of its own, the run gets Ctrl-C once, through this process.
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
    """Return a function that has the kernel send SIGTERM to a run whose comparison is killed."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    set_parent_death_signal = 1
    return lambda: prctl(set_parent_death_signal, int(signal.SIGTERM))


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop the runs, which write their checkpoints first, and wait for them."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def _reason(status: int, job: Job) -> str | None:
    """Return why a run's process ended without finishing the run; None if the run is finished."""
    if status == 0 and job.finished:
        return None
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
    return lines[-1].removeprefix("nesterov_pp: error: ")


class _Progress:
    """A progress bar for all runs on a terminal; elsewhere, a line for each run that ends."""

    def __init__(self, console: Console, waiting: Sequence[Job], later: int) -> None:
        self._console = console
        self._done: dict[Job, int] = {}
        self._total = self._first = 0
        self._began = time.monotonic()
        self._bar: Progress | None = None
        self.expect(waiting, later)
        if console.is_terminal:
            self._bar = report.make_bar(console, self._total, self._first)

    def expect(self, waiting: Sequence[Job], later: int = 0) -> None:
        """Add the jobs that run next; ``later`` microbatches come after them."""
        done = {job: microbatches_done(job.folder.metrics) for job in waiting}
        self._done |= done
        self._first += sum(done.values())
        self._total = sum(job.config.microbatches for job in self._done) + later
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], total=self._total)

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
            outcome = f"validation loss {report.read_summary(job.folder.summary)['validation_loss']:.4f}"
        left = ""
        done = sum(self._done.values())
        if done > self._first:
            seconds = (time.monotonic() - self._began) / (done - self._first) * (self._total - done)
            left = f"  ({math.ceil(seconds / 6.0) / 10.0:.1f} min left)" if seconds > 0 else ""
        say(self._console, f"{job.name}: {outcome}{left}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
