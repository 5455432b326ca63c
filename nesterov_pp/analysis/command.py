"""The command ``python -m nesterov_pp analyze``: its arguments, and the tables and the plot that it makes."""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nesterov_pp.analysis.delays import Delay, fixed, from_text

if TYPE_CHECKING:
    from rich.console import Console

LONGEST_DELAY = 64
"""The largest delay to analyze; beyond it the eigenvalues of the companion matrices take minutes."""

Typed = Callable[[Callable[[str], Any]], Callable[[str], Any]]


def add_arguments(parser: argparse.ArgumentParser, typed: Typed) -> None:
    """Add the flags of ``analyze``. ``typed`` makes an argument type of a function that raises ``ValueError``."""

    def add(name: str, parse: Callable[[str], Any], metavar: str, help_text: str) -> None:
        parser.add_argument(name, type=typed(parse), metavar=metavar, help=help_text)

    add("--delay", _delay, "N", f"delay of the gradients, in updates, 1 to {LONGEST_DELAY} (default: 7)")
    add("--momentum", _momentum, "X", "momentum of the rules that have one (default: 0.99)")
    add(
        "--horizon",
        _number("from 0 to 1e6", lambda x: 0.0 <= x <= 1e6),
        "X",
        "a further look-ahead horizon to show besides 1 and the delay, in updates (default: none)",
    )
    add(
        "--step",
        _number("from 1e-6 to 1e6", lambda x: 1e-6 <= x <= 1e6),
        "X",
        "step size x curvature at which to show the damping (default: no damping table)",
    )
    kinds = "uniform:LOW:HIGH, geometric:MEAN, gamma:MEAN:SHAPE, trace:FILE"
    add(
        "--random",
        _delays,
        "A,B,...",
        f"random delays to show, each one of {kinds} (default: three whose mean is --delay)",
    )
    add("--out", Path, "PNG", "PNG file to write the plot to (default: runs/analysis.png)")


def analyze(
    console: Console,
    *,
    delay: int = 7,
    momentum: float = 0.99,
    horizon: float | None = None,
    step: float | None = None,
    random: Sequence[Delay] | None = None,
) -> bytes:
    """Print the tables. Returns the plot as the contents of a PNG file."""
    from nesterov_pp.analysis import figure, report
    from nesterov_pp.terminal import say

    shown = report.same_mean(delay) if random is None else random
    console.print(report.steps_table(delay, momentum, horizon))
    console.print(report.delays_table([fixed(delay), *shown]))
    if step is not None:
        console.print(report.damping_table([fixed(delay), *shown], step))
    for line in report.lines(delay):
        say(console, line)
    file = io.BytesIO()
    figure.draw(file, delay, momentum, shown)
    return file.getvalue()


def _delay(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= LONGEST_DELAY:
        raise ValueError(f"needs a whole number from 1 to {LONGEST_DELAY}, not {text!r}")
    return int(text)


def _number(range_: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and fits(value)):
            raise ValueError(f"needs a number {range_}, not {text!r}")
        return value

    return parse


_momentum = _number("from 1e-6 to 1 - 1e-6", lambda x: 1e-6 <= x <= 1.0 - 1e-6)


def _delays(text: str) -> list[Delay]:
    return [from_text(part.strip()) for part in text.split(",")]
