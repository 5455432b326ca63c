"""The terminal output of a run: the lines before it, its progress, and the table after it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text as RichText

from nesterov_pp.terminal import Table, say
from nesterov_pp.training.config import Config, UserError
from nesterov_pp.training.folder import read_object
from nesterov_pp.training.metrics import Curves

TRAIN_LOSS_OVER = 100
"""The number of last microbatches over which the train loss in a table is averaged."""

_SMOOTHING = 0.95
_SHOWN: dict[str, Any] = {
    "method": str,
    **dict.fromkeys(("stages", "seed", "microbatches", "peak_memory"), int),
    **dict.fromkeys(("train_loss", "validation_loss", "perplexity", "tokens_per_second", "optimizer_share"), float),
}
_BAR = 40  # characters of the progress bar
_BESIDE_BAR = 80  # characters for what is next to it


def size(bytes_: float) -> str:
    """Format a number of bytes for display."""
    for unit in ("B", "KiB", "MiB"):
        if bytes_ < 1024:
            return f"{bytes_:.0f} {unit}" if unit == "B" else f"{bytes_:.1f} {unit}"
        bytes_ /= 1024
    return f"{bytes_:.2f} GiB"


def memory_line(memory: Mapping[str, int], delays: Sequence[int]) -> str:
    """Return a line with the bytes that a pipeline holds, and the delays that determine how many."""
    shown = [*("weights", "stash", "moments"), *(["masters"] if memory.get("masters") else [])]
    parts = " + ".join(f"{name} {size(memory[name])}" for name in shown)
    total = size(sum(memory.values()))
    return f"Memory: {parts} = {total}. Delays of the stages, in updates: {' '.join(map(str, delays))}."


def make_bar(console: Console, total: int, done: int) -> Progress:
    """Start and return a progress bar with one task, counted in microbatches.

    A narrow terminal has no room for the bar and the time so far; the description is broken between words.
    """
    room = min(_BAR, console.width - _BESIDE_BAR)
    bar = Progress(
        *([BarColumn(room)] if room >= _BAR // 4 else []),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
        *([TimeElapsedColumn(Column(no_wrap=True))] if console.width >= _BESIDE_BAR else []),
        TextColumn("ETA"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        console=console,
    )
    bar.add_task("", total=total, completed=done)
    bar.start()
    return bar


class RunProgress:
    """A progress bar on a terminal; elsewhere, a line at each validation."""

    def __init__(self, console: Console, start: int, total: int) -> None:
        self._console, self._start, self._done, self._total = console, start, start, total
        self._loss = self._rate = math.nan
        self._validation = ""
        self._began = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = make_bar(console, total, start)

    def step(self, done: int, loss: float, tokens_per_second: float) -> None:
        """Show a microbatch's loss (smoothed) and the speed."""
        self._done, self._rate = done, tokens_per_second
        self._loss = loss if math.isnan(self._loss) else _SMOOTHING * self._loss + (1.0 - _SMOOTHING) * loss
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, description=self._text())

    def validated(self, loss: float) -> None:
        """Show a validation loss."""
        self._validation = f"  validation {loss:.3f}"
        if self._bar is None:
            left = (time.monotonic() - self._began) / (self._done - self._start) * (self._total - self._done)
            eta = f"{int(left) // 60}:{int(left) % 60:02d}"
            say(self._console, f"microbatch {self._done}/{self._total}  {self._text()}  ETA {eta}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _text(self) -> str:
        return f"loss {self._loss:.3f}{self._validation}  {self._rate:,.0f} tokens/s"


def summarise(
    config: Config,
    curves: Curves,
    *,
    delays: Sequence[int],
    memory: Mapping[str, int],
    seconds: float,
    optimizer_seconds: float,
    peak_memory: int,
) -> dict[str, Any]:
    """Return the numbers of a finished run. Losses are in nats per token, memory in bytes."""
    last = curves.train[-TRAIN_LOSS_OVER:]
    validation_loss = curves.validation[-1][1]
    return {
        "method": config.method,
        "stages": config.stages,
        "delays": list(delays),
        "seed": config.seed,
        "microbatches": config.microbatches,
        "updates": config.updates,
        "train_loss": math.fsum(last) / len(last),
        "validation_loss": validation_loss,
        "perplexity": perplexity(validation_loss),
        "tokens_per_second": config.microbatches * config.batch * config.context / seconds,
        "optimizer_share": optimizer_seconds / seconds,
        "cosines": {stage: math.fsum(c for _, c in points) / len(points) for stage, points in curves.cosines.items()},
        "seconds": seconds,
        "peak_memory": peak_memory,
        "pipeline_memory": dict(memory),
    }


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, with ``loss`` capped at 700 so that it does not overflow."""
    return math.exp(min(loss, 700.0))


def read_summary(path: Path) -> dict[str, Any]:
    """Return the numbers of a finished run from its file; raise UserError if it lacks one of those that are shown."""
    summary = read_object(path)
    if not all(isinstance(summary.get(name), kind) for name, kind in _SHOWN.items()):
        raise UserError(f"{path} is damaged or of another version of nesterov_pp; give another --out")
    return summary


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Print the final table of a run."""
    table = Table(title=f"{summary['method']}, {summary['stages']} stages, {summary['microbatches']} microbatches")
    for heading in ("Train loss", "Validation loss", "Perplexity", "Tokens/s", "Optimizer time", "Peak memory"):
        table.add_column(heading, justify="right")
    table.add_row(
        f"{summary['train_loss']:.4f}",
        f"{summary['validation_loss']:.4f}",
        f"{summary['perplexity']:.2f}",
        f"{summary['tokens_per_second']:,.0f}",
        f"{100.0 * summary['optimizer_share']:.1f} %",
        size(summary["peak_memory"]),
    )
    console.print(table)
    if summary.get("cosines"):
        by_stage = ", ".join(f"{stage}: {cosine:.3f}" for stage, cosine in summary["cosines"].items())
        say(console, f"Mean cosine of look-ahead and displacement, by stage: {by_stage}.")


def print_sample(console: Console, sample: str) -> None:
    """Print generated text in a frame, with a question mark for what standard output cannot encode."""
    sample = sample.encode(console.encoding, errors="replace").decode(console.encoding)
    console.print(Panel(RichText(sample), title=escape("Sample (continues the beginning of the validation text)")))
