"""The delays of a pipeline whose stages are teams of unequal workers that come and go."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

FORWARD_SHARE = 1 / 3
"""The share of a microbatch's time on a worker that forward takes; backward takes the rest."""


@dataclass(frozen=True)
class Swarm:
    """Stochastic wiring after SWARM (arXiv 2301.11913): every microbatch picks a worker of each stage.

    It picks, among the workers that are present, the one with the lowest count of picks (this one included) divided by
    its speed (interleaved weighted round-robin). Forward and backward of a microbatch use the same workers, which serve
    one microbatch at a time in order of arrival. The workers of a stage hold the same weights, updated after every
    backward; a microbatch's delay on a stage is the number of updates between its forward and its backward.
    Microbatches are taken in the order in which they return to the first stage. A microbatch is lost if the worker that
    holds it leaves, or if it is later than ``largest`` updates.

    Args:
        speeds: for each stage, the number of microbatches that each of its workers processes per unit of time.
        in_flight: number of microbatches in flight at a time.
        cut: the largest delay, in updates.
        mean_up, mean_down: mean times for which a worker is present and absent, exponentially distributed. With
            ``mean_up`` 0, workers stay forever. The first worker of a stage always stays.
        seed: seed for these times.

    Raises:
        ValueError: a stage has no worker, or a number is out of range.
    """

    speeds: tuple[tuple[float, ...], ...]
    in_flight: int
    cut: int
    mean_up: float = 0.0
    mean_down: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.speeds or not all(self.speeds) or any(v <= 0.0 for stage in self.speeds for v in stage):
            raise ValueError(f"each stage of a swarm needs workers, all with a speed above 0, not {self.speeds}")
        if self.in_flight < 1 or self.cut < 1 or self.mean_up < 0.0 or self.mean_down < 0.0:
            raise ValueError(
                "in_flight and cut must be at least 1, and mean_up and mean_down at least 0, not "
                f"{self.in_flight}, {self.cut}, {self.mean_up} and {self.mean_down}"
            )

    @property
    def largest(self) -> list[int]:
        return [self.cut] * len(self.speeds)

    @property
    def expected(self) -> list[int]:
        """The mean delays over the first 500 microbatches."""
        rows = [row for row in (self.draw(m) for m in range(500)) if row is not None]
        return [round(sum(column) / len(column)) for column in zip(*rows, strict=True)]

    def draw(self, microbatch: int) -> list[int] | None:
        simulation = _simulated(self)
        while len(simulation.rows) <= microbatch:
            simulation.rows.append(next(simulation.events))
        row = simulation.rows[microbatch]
        return None if row is None or max(row) > self.cut else list(row)


class _Simulation:
    def __init__(self, swarm: Swarm) -> None:
        self.rows: list[Sequence[int] | None] = []
        self.events = _run(swarm)


@lru_cache(maxsize=16)
def _simulated(swarm: Swarm) -> _Simulation:
    return _Simulation(swarm)


class _Worker:
    """A worker of a stage. Its queue is the time at which it is free; ``away`` are the spans in which it is absent."""

    def __init__(self, speed: float, away: Iterator[tuple[float, float]]) -> None:
        self.speed, self.picks, self.free = speed, 0, 0.0
        self._away, self._span = away, next(away)

    def present(self, now: float) -> bool:
        while self._span[1] <= now:
            self._span = next(self._away)
        return now < self._span[0]

    def leaves_before(self, end: float) -> bool:
        """Return whether the worker, which is present now, leaves before ``end``."""
        return self._span[0] < end

    def serve(self, now: float, share: float) -> float:
        self.free = max(self.free, now) + share / self.speed
        return self.free


def _run(swarm: Swarm) -> Iterator[Sequence[int] | None]:
    """Yield rows of delays in order of completion. A microbatch is (worker of each stage, updates at each forward)."""
    stages = len(swarm.speeds)
    teams = [[_Worker(v, _absences(swarm, s, w)) for w, v in enumerate(team)] for s, team in enumerate(swarm.speeds)]
    updates = [0] * stages
    order = count()
    # (time, tie-breaker, stage, forward?, path, updates seen, delays)
    events: list[tuple[float, int, int, bool, list[_Worker], list[int], list[int]]] = []
    for _ in range(swarm.in_flight):
        heapq.heappush(events, (0.0, next(order), 0, True, [], [], []))
    while True:
        now, _, stage, forward, path, seen, delays = heapq.heappop(events)
        if forward and stage < stages:
            worker = min((w for w in teams[stage] if w.present(now)), key=lambda w: (w.picks + 1) / w.speed)
            worker.picks += 1
            done = worker.serve(now, FORWARD_SHARE)
            arrived = (done, next(order), stage + 1, True, [*path, worker], [*seen, updates[stage]], delays)
            heapq.heappush(events, arrived)
            continue
        if forward:  # past the last stage: the loss, then backward
            stage -= 1
        worker = path[stage]
        lost = not worker.present(now) or worker.leaves_before(max(worker.free, now) + 1 / worker.speed)
        if not lost:
            done = worker.serve(now, 1 - FORWARD_SHARE)
            delays = [updates[stage] - seen[stage], *delays]
            updates[stage] += 1
            if stage > 0:
                heapq.heappush(events, (done, next(order), stage - 1, False, path, seen, delays))
                continue
            now = done
        yield None if lost else delays
        heapq.heappush(events, (now, next(order), 0, True, [], [], []))


def _absences(swarm: Swarm, stage: int, worker: int) -> Iterator[tuple[float, float]]:
    """Yield the spans (from, to) in which a worker is absent, in order; after the last, spans at infinity forever."""
    now, draw = 0.0, random.Random(f"{swarm.seed}/{stage}/{worker}")
    while worker > 0 and swarm.mean_up > 0.0:
        begin = now + draw.expovariate(1 / swarm.mean_up)
        now = begin + (draw.expovariate(1 / swarm.mean_down) if swarm.mean_down > 0.0 else 0.0)
        yield begin, now
    while True:
        yield float("inf"), float("inf")
