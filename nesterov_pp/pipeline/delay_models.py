"""Delays: when a stage's gradient is applied, and at which weights it was computed.

A delay counts the updates of a stage between a microbatch's forward and the application of its gradient. Delay models
draw it from (stage, microbatch) alone, so a run that is resumed draws the delays that it would have drawn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


def forwards_ahead(stages: int, slack: int = 0) -> list[int]:
    """Return the number of forwards by which each stage may be ahead of its backwards, first stage first.

    ``a_i = P - i + ceil(n (P - i) / (P - 1))`` for i = 1 ... P and a slack of n: the first stage, and with it the whole
    pipeline, has n further microbatches in flight. The links between a stage and the last one take part of the round
    trip, so it needs that part of the slack. The last stage waits for no gradient and has none.
    """
    links = max(1, stages - 1)
    return [stages - i - (-slack * (stages - i) // links) for i in range(1, stages + 1)]


def stage_delays(stages: int, microbatches_per_update: int = 1, slack: int = 0) -> list[int]:
    """Return the delay of each stage in updates, first stage first.

    ``tau_i = floor((2 a_i + 1) / (2 K))`` for i = 1 ... P, where ``a_i`` is that of ``forwards_ahead``: ``P - i``
    without slack. This is PipeDream's never-flushing schedule (one forward, one backward); the last stage has no delay.

    Raises:
        ValueError: ``stages`` or ``microbatches_per_update`` is below 1.
    """
    if stages < 1 or microbatches_per_update < 1:
        raise ValueError(
            f"stages and microbatches_per_update must be at least 1, not {stages} and {microbatches_per_update}"
        )
    return [(2 * ahead + 1) // (2 * microbatches_per_update) for ahead in forwards_ahead(stages, slack)]


def version_for_update(update: int, delay: int, drained_at: int = 0) -> int:
    """Return the weight version that an update's microbatches run with: ``max(drained_at, update - delay)``.

    ``drained_at`` is the update before which the pipeline was last empty (0: the start).
    """
    return max(drained_at, update - delay)


class Delays(Protocol):
    """A model of the delay of every microbatch on every stage. Lists have one entry per stage, first stage first."""

    @property
    def largest(self) -> list[int]:
        """The upper bounds of the delays; a stage keeps one weight version more than its bound."""

    @property
    def expected(self) -> list[int]:
        """The delays given to a method that assumes constant delays."""

    def draw(self, microbatch: int) -> list[int] | None:
        """Return the delays of a microbatch (from 0); None if it is lost, forward and backward."""


@dataclass(frozen=True)
class Fixed:
    """Delays that are the same for every microbatch.

    Raises:
        ValueError: a delay is negative.
    """

    delays: Sequence[int]

    def __post_init__(self) -> None:
        _check_whole("a delay", self.delays)

    @property
    def largest(self) -> list[int]:
        return list(self.delays)

    @property
    def expected(self) -> list[int]:
        return list(self.delays)

    def draw(self, microbatch: int) -> list[int]:
        return list(self.delays)


@dataclass(frozen=True)
class LocalAccumulation:
    """The delays of a pipeline that counts microbatches, not updates.

    Stage i has ``P - i`` microbatches in flight and updates after every ``K`` backwards, whichever microbatches they
    belong to, so the delays within one update differ by one. Microbatch ``m`` runs its forward after ``m - (P - i)``
    backwards and is applied in update ``floor(m / K)``.
    """

    stages: int
    microbatches_per_update: int

    @property
    def largest(self) -> list[int]:
        return [math.ceil((self.stages - i) / self.microbatches_per_update) for i in range(1, self.stages + 1)]

    @property
    def expected(self) -> list[int]:
        return stage_delays(self.stages, self.microbatches_per_update)

    def draw(self, microbatch: int) -> list[int]:
        k = self.microbatches_per_update
        return [microbatch // k - max(0, microbatch - self.stages + i) // k for i in range(1, self.stages + 1)]


@dataclass(frozen=True)
class Uniform:
    """Delays drawn anew for every microbatch and stage, uniformly from ``low_i ... high_i``.

    Raises:
        ValueError: the lists differ in length, or a range is empty or negative.
    """

    low: Sequence[int]
    high: Sequence[int]
    seed: int = 0

    def __post_init__(self) -> None:
        _check_whole("a delay", self.low)
        if len(self.low) != len(self.high) or any(a > b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError(f"uniform delays need low <= high for each stage, not {self.low} and {self.high}")

    @property
    def largest(self) -> list[int]:
        return list(self.high)

    @property
    def expected(self) -> list[int]:
        return [round((a + b) / 2) for a, b in zip(self.low, self.high, strict=True)]

    def draw(self, microbatch: int) -> list[int]:
        pairs = zip(self.low, self.high, strict=True)
        return [_random(self.seed, i, microbatch).randint(a, b) for i, (a, b) in enumerate(pairs)]


@dataclass(frozen=True)
class Geometric:
    """Delays with ``P(tau = k) = p (1 - p)^k``, ``p = 1 / (1 + mean_i)``, cut off at ``cut_i``.

    Raises:
        ValueError: the lists differ in length, or contain a negative number.
    """

    mean: Sequence[float]
    cut: Sequence[int]
    seed: int = 0

    def __post_init__(self) -> None:
        _check_whole("the largest delay", self.cut)
        if len(self.mean) != len(self.cut) or any(not 0.0 <= m < math.inf for m in self.mean):
            raise ValueError(f"geometric delays need a mean of at least 0 for each stage, not {self.mean}")

    @property
    def largest(self) -> list[int]:
        return list(self.cut)

    @property
    def expected(self) -> list[int]:
        return [min(round(m), c) for m, c in zip(self.mean, self.cut, strict=True)]

    def draw(self, microbatch: int) -> list[int]:
        return [self._one(i, microbatch) for i in range(len(self.mean))]

    def _one(self, stage: int, microbatch: int) -> int:
        if self.mean[stage] == 0.0:
            return 0
        uniform = 1.0 - _random(self.seed, stage, microbatch).random()  # above 0
        stay = self.mean[stage] / (1.0 + self.mean[stage])
        return min(int(math.log(uniform) / math.log(stay)), self.cut[stage])


@dataclass(frozen=True)
class Trace:
    """Recorded delays, with one row per microbatch and one entry per stage. None marks a microbatch that is lost.

    After the last row the trace starts again from the first.

    Raises:
        ValueError: there are no rows of delays, or the rows differ in length.
    """

    rows: Sequence[Sequence[int] | None]

    def __post_init__(self) -> None:
        kept = [row for row in self.rows if row is not None]
        if not kept or any(len(row) != len(kept[0]) for row in kept):
            raise ValueError("a trace of delays needs rows with one delay for each stage")
        for row in kept:
            _check_whole("a delay", row)

    @classmethod
    def read(cls, path: str | Path) -> Trace:
        """Read a trace from a text file with one line per microbatch.

        A line has one entry per stage, separated by commas or spaces, or ``-`` for a microbatch that is lost. ``#``
        starts a comment.

        Raises:
            ValueError: a line has another form.
            OSError: the file cannot be read.
        """
        rows: list[list[int] | None] = []
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
            words = line.split("#")[0].replace(",", " ").split()
            if not words:
                continue
            if words != ["-"] and not all(word.isdecimal() for word in words):
                raise ValueError(
                    f"{path}, line {number}: a trace has whole numbers of at least 0, or '-', not {line!r}"
                )
            rows.append(None if words == ["-"] else [int(word) for word in words])
        return cls(rows)

    @property
    def largest(self) -> list[int]:
        return [max(column) for column in self._columns()]

    @property
    def expected(self) -> list[int]:
        return [round(sum(column) / len(column)) for column in self._columns()]

    def draw(self, microbatch: int) -> list[int] | None:
        row = self.rows[microbatch % len(self.rows)]
        return None if row is None else list(row)

    def _columns(self) -> list[tuple[int, ...]]:
        return list(zip(*[row for row in self.rows if row is not None], strict=True))


@dataclass(frozen=True)
class Stragglers:
    """The ``usual`` delays, each of which is larger by ``extra`` with the given ``probability``.

    Raises:
        ValueError: ``probability`` is not from 0 to 1, or ``extra`` is negative.
    """

    usual: Delays
    probability: float
    extra: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_probability(self.probability)
        _check_whole("the extra delay", [self.extra])

    @property
    def largest(self) -> list[int]:
        return [tau + self.extra for tau in self.usual.largest]

    @property
    def expected(self) -> list[int]:
        return [round(tau + self.probability * self.extra) for tau in self.usual.expected]

    def draw(self, microbatch: int) -> list[int] | None:
        usual = self.usual.draw(microbatch)
        if usual is None:
            return None
        late = [_random(self.seed, i, microbatch).random() < self.probability for i in range(len(usual))]
        return [tau + self.extra * slow for tau, slow in zip(usual, late, strict=True)]


@dataclass(frozen=True)
class DropOuts:
    """The ``usual`` delays, but a microbatch is lost with the given ``probability``: a worker that held it has left.

    Raises:
        ValueError: ``probability`` is not from 0 to 1.
    """

    usual: Delays
    probability: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check_probability(self.probability)

    @property
    def largest(self) -> list[int]:
        return self.usual.largest

    @property
    def expected(self) -> list[int]:
        return self.usual.expected

    def draw(self, microbatch: int) -> list[int] | None:
        lost = _random(self.seed, -1, microbatch).random() < self.probability
        return None if lost else self.usual.draw(microbatch)


def one_forward_one_backward(stages: int, microbatches_per_update: int) -> Delays:
    """Return the delays of ``stage_delays`` as a model."""
    return Fixed(stage_delays(stages, microbatches_per_update))


def _random(seed: int, stage: int, microbatch: int) -> random.Random:
    return random.Random(f"{seed}/{stage}/{microbatch}")


def _check_whole(what: str, values: Sequence[int]) -> None:
    if any(not isinstance(value, int) or value < 0 for value in values):
        raise ValueError(f"{what} must be a whole number of at least 0, not {values}")


def _check_probability(value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"a probability must be from 0 to 1, not {value}")
