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
from functools import partial
from pathlib import Path
from typing import IO, Any

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

    several_rates: bool = False
    several_depths: bool = False

    @property
    def name(self) -> str:
        rate = f" lr {self.config.lr:g}" if self.several_rates else ""
        depth = f" {self.config.stages} stages" if self.several_depths else ""
        return f"{self.config.method} seed {self.config.seed}{rate}{depth}"

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
    rates: Sequence[float] = (),
    depths: Sequence[int] = (),
    resume: bool = False,
    console: Console | None = None,
) -> None:
    """Train every method with every seed, ``jobs`` at a time, each on one thread unless ``given`` has ``threads``.

    ``rates`` and ``depths``: every one of these learning rates and numbers of stages too, instead of ``given``'s. Each
    method is judged by its best rate.

    Runs lie in ``out/METHOD/seed-N``; with several rates or depths in ``out/stages-P/lr-X/METHOD/seed-N``. With
    ``resume``, finished runs are taken as they are and unfinished ones go on.

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
    plan = _plan(given, methods, seeds, rates, depths, out)
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
    _report([job for job in plan if job.finished], out, console, [f"{j.name}: {r}" for j, r in failed])
    if failed:
        raise RunError("; ".join(f"{job.name} failed ({reason})" for job, reason in failed))


def _check_data(config: Config) -> None:
    """Raises: UserError: no run could train on it."""
    text = read_text(config.data)
    tokenize(text, ByteTokenizer(), config.context)
    if config.tokenizer == "bpe":
        check_text(text.train + text.validation)


def _plan(
    given: Mapping[str, Any],
    methods: Sequence[str],
    seeds: Sequence[int],
    rates: Sequence[float],
    depths: Sequence[int],
    out: Path,
) -> list[Job]:
    """All runs; seeds outside, so that every method has a run before any has its second."""
    grid = [
        ({"lr": rate} if rates else {}) | ({"stages": depth} if depths else {})
        for depth in depths or (None,)
        for rate in rates or (None,)
    ]
    several = (len(rates) > 1, len(depths) > 1)
    return [
        _job({**given, **point, "method": m, "seed": s}, out, *several)
        for s in seeds
        for point in grid
        for m in methods
    ]


def _job(given: Mapping[str, Any], out: Path, several_rates: bool, several_depths: bool) -> Job:
    """Raises: UserError: the run's folder holds a run with other settings."""
    config = Config(**given)
    if several_depths:
        out /= f"stages-{config.stages}"
    if several_rates:
        out /= f"lr-{config.lr:g}"
    folder = RunFolder(out / config.method / f"seed-{config.seed}")
    if folder.config.exists():
        there = settle({}, read_object(folder.config).get("config", {}))
        for name, value in vars(config).items():
            if name not in FREE and getattr(there, name) != value:
                raise UserError(f"{folder.path}: {differs(flag(name), getattr(there, name), value)}")
    return Job(config, folder, several_rates, several_depths)


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


def _report(finished: Sequence[Job], out: Path, console: Console, failed: Sequence[str]) -> None:
    depths = sorted({job.config.stages for job in finished})
    by_depth, sentences = {}, []
    for depth in depths:
        end = f"-{depth}-stages" if len(depths) > 1 else ""
        rows, curves = _judged([job for job in finished if job.config.stages == depth])
        checkpoint.write_atomic(out / f"compare{end}.png", partial(_draw, curves))
        sentence = comparison.sentence(rows)
        checkpoint.write_text(out / f"compare{end}.md", comparison.markdown(rows, sentence))
        console.print(comparison.table(rows, f"{depth} stages" if end else "Comparison"))
        by_depth[depth] = rows
        sentences += [sentence] if sentence else []
    if not depths:
        return
    if len(depths) > 1:
        checkpoint.write_text(out / "compare.md", comparison.depth_markdown(by_depth))
        checkpoint.write_atomic(out / "compare.png", lambda file: plots.draw_depths(file, by_depth))
    rows = [row for rows in by_depth.values() for row in rows]
    result = {"methods": rows, "comparison": " ".join(sentences), "failed": list(failed)}
    checkpoint.write_text(out / "compare.json", json.dumps(result, indent=2) + "\n")
    for sentence in sentences:
        console.print(sentence, soft_wrap=True)
    console.print(f"Table and plot are in {out}: compare.md, compare.json, compare.png.", soft_wrap=True)


def _draw(curves: dict[str, list[Curves]], file: IO[bytes]) -> None:
    plots.draw_comparison(file, curves)


def _judged(jobs: Sequence[Job]) -> tuple[list[dict[str, Any]], dict[str, list[Curves]]]:
    """A row for each method with its best learning rate, and the curves of its runs; methods in the order of runs."""
    runs: dict[tuple[str, float], list[Job]] = {}
    for job in jobs:
        runs.setdefault((job.config.method, job.config.lr), []).append(job)
    rows = [
        {
            **comparison.summarise([read_object(job.folder.summary) for job in of_point]),
            "stages": of_point[0].config.stages,
            "lr": of_point[0].config.lr,
        }
        for of_point in runs.values()
    ]
    best = comparison.best_rates(rows)
    curves = {
        row["method"]: [read_curves(job.folder.metrics) for job in runs[row["method"], row["lr"]]] for row in best
    }
    return comparison.relate(best, {m: comparison.mean_curve(c) for m, c in curves.items()}), curves


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
