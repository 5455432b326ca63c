"""An event-by-event simulation of a swarm: stages of workers with given speeds, links and failures.

It follows ``nesterov_pp.swarm``: the wiring and what is sent again are those of its ``scheduler``, updates those of its
``rounds``. Left out: the coordinator's failures, rounds that wait for a worker that is too far behind, states that take
longer to travel than ``--straggler`` allows, and forwards that run again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from nesterov_pp.planning.layers import StageCost
from nesterov_pp.planning.simulate import Network
from nesterov_pp.planning.swarm_events import Run
from nesterov_pp.swarm.scheduler import GRACE

if TYPE_CHECKING:
    from nesterov_pp.terminal import Table

_LONGEST, _MOST_FAILURES = 50.0, 10_000
_FILLINGS, _FAILURES, _PASSES = 5, 20, 100_000


class Speeds(NamedTuple):
    """The speeds of a stage's workers: ``values`` in turn, or if ``drawn`` evenly between the two of them."""

    values: tuple[float, ...] = (1.0,)
    drawn: bool = False

    def of(self, stages: int, workers: int, seed: int = 0) -> list[list[float]]:
        """Return the speeds of the workers of all stages.

        Raises:
            ValueError: there are more speeds than workers of a stage.
        """
        if self.drawn:
            draw = random.Random(f"{seed}/speeds")
            return [[draw.uniform(*self.values) for _ in range(workers)] for _ in range(stages)]
        if len(self.values) > workers:
            raise ValueError(f"{len(self.values)} speeds do not fit {workers} workers a stage; give more --workers")
        return [[self.values[k % len(self.values)] for k in range(workers)] for _ in range(stages)]


@dataclass(frozen=True)
class SimulatedSwarm:
    """The result of a simulated run.

    Attributes:
        microbatches_per_second: over the run without its first quarter; what was lost later counts once.
        share_of_best: the same over what the slowest stage's workers compute if they never wait, step or fail.
        mean_delays, largest_delays: for each stage, the updates between a gradient's forward and its own update.
        microbatches: those done, in all.
        sent_again: how many times a microbatch was sent again.
        taken_over: how many times a peer finished a microbatch of a worker that had failed.
        failures: deaths of workers.
        without_worker: the share of the time in which some stage had no worker.
        seconds: time simulated.
    """

    microbatches_per_second: float
    share_of_best: float
    mean_delays: list[float]
    largest_delays: list[int]
    microbatches: int
    sent_again: int
    taken_over: int
    failures: int
    without_worker: float
    seconds: float


def best_rate(costs: Sequence[StageCost], speeds: Sequence[Sequence[float]]) -> float:
    """Return the microbatches a second of the slowest stage if its workers compute forwards and backwards only."""
    return min(sum(team) / (c.forward + c.backward) for c, team in zip(costs, speeds, strict=True))


def simulate_swarm(
    costs: Sequence[StageCost],
    speeds: Sequence[Sequence[float]],
    network: Network,
    microbatches: int,
    *,
    failure_seconds: float = math.inf,
    rejoin_seconds: float = 60.0,
    state_bytes: Sequence[float] | None = None,
    in_flight: float = 2.0,
    checkpoint_every: int = 100,
    variation: float = 0.0,
    seed: int = 0,
) -> SimulatedSwarm:
    """Simulate a swarm until ``microbatches`` are done, for 50 times as long as at best or for 10,000 deaths at most.

    Args:
        costs: the costs of each stage, of a worker at speed 1.
        speeds: for each stage, the speeds of its workers.
        network: the link of each worker to all others, which its messages share; a round's bundles share it, too, one
            stream for each other worker of the stage.
        microbatches: length of the run; it begins with empty queues, so give several times as many as are in flight.
        failure_seconds: mean time between a worker's (re)start and its death; deaths are a Poisson process.
        rejoin_seconds: from a worker's death until one with the same speed is connected in its place.
        state_bytes: for each stage, what that one must receive before it computes (default: the weights).
        in_flight: microbatches in flight for each living worker.
        checkpoint_every: updates of a stage between two checkpoints; what came later is lost with its last worker.
        variation: standard deviation of the times of forwards and backwards, as a multiple of their means; lognormal.
        seed: of the wiring, the failures and the times.

    Raises:
        ValueError: an argument is out of range.
    """
    states = [float(c.weight_bytes) for c in costs] if state_bytes is None else list(state_bytes)
    if not costs or len(speeds) != len(costs) or len(states) != len(costs):
        raise ValueError("a simulated swarm needs costs, speeds and bytes of the state for each of at least one stage")
    if any(not team or min(team) <= 0 or not math.isfinite(sum(team)) for team in speeds):
        raise ValueError("every stage of a simulated swarm needs at least one worker, and speeds above 0")
    if any(c.forward + c.backward <= 0 for c in costs):
        raise ValueError("every stage of a simulated swarm needs a time for its forward and backward above 0")
    if microbatches < 4 or checkpoint_every < 1 or in_flight <= 0:
        raise ValueError("a simulated swarm needs at least 4 microbatches, and in_flight and checkpoint_every above 0")
    if failure_seconds <= 0 or not 0 <= rejoin_seconds < math.inf:
        raise ValueError("failure_seconds must be above 0, and rejoin_seconds a finite time of at least 0")
    if not 0 <= variation < math.inf:
        raise ValueError("variation must be a finite number of at least 0")
    run = Run(
        costs, speeds, network, failure_seconds, rejoin_seconds, states, in_flight, checkpoint_every, variation, seed
    )
    best = best_rate(costs, speeds)
    longest = _LONGEST * (microbatches / best + rejoin_seconds + GRACE)
    begun, before = 0.0, 0
    while run.done < microbatches and run.failures < _MOST_FAILURES and run.step(longest):
        if not before and run.done >= microbatches // 4:
            begun, before = run.now, run.done
    rate = (run.done - before) / (run.now - begun) if run.now > begun else 0.0
    return SimulatedSwarm(
        microbatches_per_second=rate,
        share_of_best=rate / best,
        mean_delays=[team.delays / max(1, team.gradients) for team in run.teams],
        largest_delays=[team.largest for team in run.teams],
        microbatches=run.done,
        sent_again=run.again,
        taken_over=run.taken_over,
        failures=run.failures,
        without_worker=run.without_worker / run.now if run.now else 0.0,
        seconds=run.now,
    )


def long_enough(best: float, stages: int, workers: int, failure_seconds: float, in_flight: float) -> int:
    """Return how many microbatches to simulate: those in flight several times, and further ones to see failures.

    Args:
        best: that of ``best_rate``.
        stages: number of stages.
        workers: number of workers of all stages.
        failure_seconds, in_flight: as in ``simulate_swarm``.
    """
    least = max(400, math.ceil(_FILLINGS * in_flight * workers))
    if failure_seconds == math.inf:
        return least
    return max(least, min(_PASSES // stages, math.ceil(best * _FAILURES * failure_seconds / workers)))


def swarm_table(rows: Sequence[tuple[int, int, SimulatedSwarm]], tokens: int) -> Table:
    """Return the table of ``plan --swarm``.

    Args:
        rows: stages, workers a stage, and what was found.
        tokens: of a microbatch.
    """
    from nesterov_pp.terminal import Table

    table = Table(title="Simulated swarms; delays in updates: mean (largest)")
    for heading in ("Stages", "Workers a stage", "Microbatches/s", "Tokens/s", "Of the best", "Delay, first stage"):
        table.add_column(heading, justify="right")
    for heading in ("Delay, last stage", "Failures", "Sent again", "No worker"):
        table.add_column(heading, justify="right")
    for stages, workers, found in rows:
        delays = [f"{a:.1f} ({b})" for a, b in zip(found.mean_delays, found.largest_delays, strict=True)]
        table.add_row(
            str(stages),
            str(workers),
            f"{found.microbatches_per_second:.3g}",
            f"{tokens * found.microbatches_per_second:,.0f}",
            f"{found.share_of_best:.1%}",
            delays[0],
            delays[-1],
            f"{found.failures} in {_time(found.seconds)}",
            f"{found.sent_again} of {found.microbatches}",
            f"{found.without_worker:.1%}",
        )
    return table


def _time(seconds: float) -> str:
    for size, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.3g} s"
