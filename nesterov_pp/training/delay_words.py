"""The delays of a virtual pipeline in words, as ``train --delays`` takes them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from nesterov_pp.pipeline import Recipe
from nesterov_pp.pipeline.delay_models import Delays, DropOuts, Fixed, Geometric, Stragglers, Trace, Uniform

T = TypeVar("T")

CUT = 4
"""Geometric delays are cut off at this multiple of their mean."""

LONGEST = 10_000
"""The longest delay, in updates; a stage keeps one version of its weights for each of them."""

FORMS = (
    "own, 3,2,1,0, uniform:0-4, geometric:2.5 or trace:FILE, optionally followed by +stragglers:0.1:5 or +dropouts:0.05"
)


def read_delays(words: str, recipe: Recipe, stages: int, microbatches_per_update: int, seed: int) -> Delays:
    """Parse ``USUAL[+stragglers:PROBABILITY:EXTRA][+dropouts:PROBABILITY]``.

    ``USUAL`` is ``own`` (the method's delays), a list of numbers, ``uniform:`` with a list of ``LOW-HIGH``,
    ``geometric:`` with a list of means, or ``trace:`` with the path of a file (``pipeline.Trace.read``). A list has one
    entry per stage, separated by commas; a single entry applies to every stage.

    Raises:
        ValueError: the words have another form, or the delays are not possible.
        OSError: the trace cannot be read.
    """
    usual, *more = re.split(r"\+(?=stragglers:|dropouts:)", words)
    kind, _, rest = usual.partition(":")
    listed = partial(_listed, words, stages)
    delays: Delays
    if usual == "own":
        delays = recipe.delays_of(stages, microbatches_per_update)
    elif kind == "uniform":
        pairs = listed(rest, _range)
        delays = Uniform([low for low, _ in pairs], [high for _, high in pairs], seed)
    elif kind == "geometric":
        means = listed(rest, _mean)
        delays = Geometric(means, [max(1, round(CUT * mean)) if mean > 0.0 else 0 for mean in means], seed)
    elif kind == "trace" and rest:
        delays = Trace.read(rest)
    else:
        delays = Fixed(listed(usual, int))
    for text in more:
        delays = _modified(words, delays, text, seed)
    if max(delays.largest) > LONGEST:
        raise ValueError(f"delays can be at most {LONGEST} updates, unlike the largest of {words!r}")
    return delays


def _modified(words: str, delays: Delays, text: str, seed: int) -> Delays:
    name, *entries = text.split(":")
    try:
        values = [float(entry) for entry in entries]
    except ValueError:
        raise _unreadable(words) from None
    if name == "stragglers" and len(values) == 2 and values[1].is_integer():
        return Stragglers(delays, values[0], int(values[1]), seed)
    if name == "dropouts" and len(values) == 1:
        return DropOuts(delays, values[0], seed)
    raise _unreadable(words)


def _listed(words: str, stages: int, text: str, parse: Callable[[str], T]) -> Sequence[T]:
    try:
        values = [parse(entry) for entry in text.split(",")]
    except ValueError:
        raise _unreadable(words) from None
    if len(values) not in (1, stages):
        raise ValueError(f"delays need one entry, or one for each of the {stages} stages, not {len(values)}")
    return values * stages if len(values) == 1 else values


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high)


def _mean(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no mean")
    return value


def _unreadable(words: str) -> ValueError:
    return ValueError(f"delays must be given as {FORMS}, not {words!r}")
