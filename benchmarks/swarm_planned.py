"""What ``plan --swarm`` says of a swarm that has run, with the times that were measured in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from nesterov_pp.planning import Network, StageCost
from nesterov_pp.planning.swarm import SimulatedSwarm, simulate_swarm
from nesterov_pp.swarm.lineage import number_of
from nesterov_pp.swarm.picture import read_timeline
from nesterov_pp.swarm.trace import Trace, read_state, read_trace, weights_of

SIMULATIONS = 5


def delays_of(out: Path) -> list[list[int]]:
    """Return the delay of every microbatch on every stage, of its last update; 0 where there is none."""
    trace = read_trace(out / "trace.jsonl")
    stages = trace.run["stages"]
    total = 1 + max(one.microbatch for update in trace.updates for one in update.contributions)
    found = [[0] * stages for _ in range(total)]
    for update in trace.updates:
        for one in update.contributions:
            found[one.microbatch][update.stage] = update.number - number_of(one.backward[0][0])
    return found


def seconds_back(events: Sequence[dict[str, Any]], kills: int) -> float:
    """Return the mean time from a worker's death until the one that was started in its place computes."""
    joined, left = ([event for event in events if event["kind"] == kind] for kind in ("joined", "left"))
    ready = {event["worker"]: event["t"] for event in events if event["kind"] == "ready"}
    pairs = zip(joined[-kills:], left, strict=False)  # more workers leave than are replaced: at the end all do
    return fmean(ready[one["worker"]] - dead["t"] for one, dead in pairs if one["worker"] in ready)


def planned(out: Path, kills: int, network: Network) -> dict[str, Any]:
    """Compare a run with simulations of it, whose workers fail as often as they were killed."""
    trace = read_trace(out / "trace.jsonl")
    costs, variation, rate = _measured(out, trace)
    stages = len(costs)
    begun = [event for event in trace.events if event["kind"] == "joined"]
    team = (len(begun) - kills) // stages
    seconds = max(event["t"] for event in trace.events) - min(event["t"] for event in trace.events)
    failure, rejoin = math.inf, 0.0
    if kills:
        left = [event["t"] for event in trace.events if event["kind"] == "left"][:kills]
        rejoin = seconds_back(trace.events, kills)
        failure = stages * team * (seconds if len(left) < kills else left[-1] - left[0]) / kills
    delays = delays_of(out)
    found = [
        simulate_swarm(
            costs,
            [[1.0] * team] * stages,
            network,
            len(delays),
            failure_seconds=failure,
            rejoin_seconds=rejoin,
            variation=variation,
            seed=seed,
        )
        for seed in range(SIMULATIONS)
    ]
    failures = max(1, sum(f.failures for f in found))
    real = [[round(fmean(column), 1), max(column)] for column in zip(*delays, strict=True)]
    return {
        "variation": round(variation, 2),
        "microbatches a second, planned and real": [round(fmean(f.microbatches_per_second for f in found), 1), rate],
        "mean and largest delays, planned": [_delays(found, s) for s in range(stages)],
        "mean and largest delays, real": real,
        "sent again a kill, planned": round(sum(f.sent_again for f in found) / failures, 2),
        "taken over a kill, planned": round(sum(f.taken_over for f in found) / failures, 2),
    }


def _delays(found: list[SimulatedSwarm], stage: int) -> list[float]:
    mean, largest = (fmean(getattr(f, name)[stage] for f in found) for name in ("mean_delays", "largest_delays"))
    return [round(mean, 1), round(largest, 1)]


def _measured(out: Path, trace: Trace) -> tuple[list[StageCost], float, float]:
    """Return the costs of the stages, the variation of their times, and microbatches a second."""
    stage = {event["worker"]: event["stage"] for event in trace.events if event["kind"] == "joined"}
    times: dict[tuple[int, str], list[float]] = {}
    ends = []
    for worker, spans in read_timeline(out / "timeline.jsonl").items():
        for kind, _, begin, end in spans:
            times.setdefault((stage[worker], kind), []).append(end - begin)
            if kind == "backward" and stage[worker] == 0:
                ends.append(end)
    message = 4 * math.prod(int(trace.run["config"][name]) for name in ("batch", "context", "width"))
    costs = []
    for s in range(trace.run["stages"]):
        forward, backward, step = (fmean(times[s, kind]) for kind in ("forward", "backward", "step"))
        weights = weights_of(read_state(out / f"stage-{s + 1}.state"))
        costs.append(StageCost(forward, backward, step, message, sum(t.nbytes for t in weights.values())))
    spread = [pstdev(own) / fmean(own) for (_, kind), own in times.items() if kind != "step"]
    ends.sort()
    middle = ends[len(ends) // 5 : -len(ends) // 5]
    return costs, fmean(spread), round((len(middle) - 1) / (middle[-1] - middle[0]), 1)
