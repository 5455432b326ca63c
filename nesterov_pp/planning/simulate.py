"""An event-by-event simulation of a pipeline's schedule, with given times of stages and links."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from nesterov_pp.pipeline.delay_models import forwards_ahead, stage_delays
from nesterov_pp.pipeline.schedule import forward_limit
from nesterov_pp.planning.layers import StageCost

SCHEDULES = ("async", "gpipe", "1f1b")


@dataclass(frozen=True)
class Network:
    """A link between neighbouring stages, one for each direction: ``latency`` in seconds, ``bandwidth`` in bytes/s."""

    latency: float = 0.0
    bandwidth: float = float("inf")


@dataclass(frozen=True)
class Simulated:
    """The result of a simulated run.

    Attributes:
        seconds_per_microbatch: time in the steady state, taken to be the second half of the run.
        utilisation: the share of the stages' time that they spend computing, over the same half.
        waiting: for each stage, the share of its time that it spends waiting, over the same half.
        seconds: time of the whole run, including filling and draining.
    """

    seconds_per_microbatch: float
    utilisation: float
    waiting: list[float]
    seconds: float


def simulate(
    schedule: str,
    costs: Sequence[StageCost],
    network: Network,
    microbatches: int,
    per_update: int = 1,
    delays: Sequence[int] | None = None,
    *,
    slack: int = 0,
    stash: bool = True,
) -> Simulated:
    """Simulate a run of ``microbatches``.

    Args:
        schedule: "async" never flushes and updates every ``per_update`` microbatches; "gpipe" (arXiv 1811.06965) and
            "1f1b" flush for every update.
        costs: the costs of each stage.
        network: the links between neighbours. A message waits for the link, not for the stages.
        microbatches: length of the run, at least two updates; a multiple of ``per_update``.
        per_update: microbatches per update.
        delays: the delay of each stage in updates, for "async" (default: those of ``stage_delays``).
        slack: further microbatches in flight, for "async".
        stash: whether "async" stashes weights: with slack, a stage may then run a backward before a forward whose
            input has not come.

    Raises:
        ValueError: the schedule is unknown, or the run is too short.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    updates = microbatches // per_update
    if not costs or per_update < 1 or microbatches % per_update or updates < 2:
        raise ValueError(
            f"a simulated run needs at least one stage and a multiple of {per_update} microbatches, at least "
            f"{2 * per_update}, not {microbatches}"
        )
    stages = len(costs)
    if schedule != "async":
        delays, slack = [0] * stages, 0
    elif delays is None:
        delays = stage_delays(stages, per_update, slack)
    orders = [
        partial(_limit, schedule, ahead, delay, microbatches, per_update)
        for ahead, delay in zip(forwards_ahead(stages, slack), delays, strict=True)
    ]
    steps, end_of_all = _play(orders, costs, network, microbatches, per_update, eager=slack > 0 and stash)
    half = updates // 2
    work = [(updates - half) * (per_update * (c.forward + c.backward) + c.step) for c in costs]
    spans = [ends[updates - 1] - ends[half - 1] for ends in steps]
    return Simulated(
        seconds_per_microbatch=spans[-1] / ((updates - half) * per_update),
        utilisation=sum(work) / sum(spans) if sum(spans) else 1.0,
        waiting=[max(0.0, 1 - w / span) if span else 0.0 for w, span in zip(work, spans, strict=True)],
        seconds=end_of_all,
    )


def _limit(schedule: str, ahead: int, delay: int, microbatches: int, k: int, m: int) -> int:
    """Return the last microbatch whose forward may run before the backward of ``m``."""
    if schedule == "gpipe":
        return m // k * k + k - 1
    return forward_limit(m, ahead=ahead, delay=delay, microbatches_per_update=k, flush_every=None, stop=microbatches)


@dataclass
class _Stage:
    """A stage at a moment: what it has done, when it is free, and when its next messages arrive."""

    forwarded: int = 0
    done: int = 0
    free: float = 0.0
    inputs: deque[float] = field(default_factory=deque)
    gradients: deque[float] = field(default_factory=deque)
    steps: list[float] = field(default_factory=list)
    link_on: float = 0.0  # when the links to the next and to the previous stage are free again
    link_back: float = 0.0


def _play(
    limits: Sequence[Callable[[int], int]],
    costs: Sequence[StageCost],
    network: Network,
    microbatches: int,
    k: int,
    *,
    eager: bool,
) -> tuple[list[list[float]], float]:
    """Return when each update of each stage ends, and when stages and links finish their last work.

    A stage runs its forwards up to the limit before a backward. If ``eager``, it runs the backward earlier where the
    gradients have come and the next activations have not.
    """
    last = len(costs) - 1
    stages = [_Stage() for _ in costs]
    wakes = [(0.0, i) for i in range(last + 1)]
    while wakes:
        now, i = heapq.heappop(wakes)
        stage, m = stages[i], stages[i].done
        if now < stage.free or m == microbatches:
            continue
        may_forward = stage.forwarded <= limits[i](m)
        has_input = i == 0 or (bool(stage.inputs) and stage.inputs[0] <= now)
        has_gradient = stage.forwarded > m and (i == last or (bool(stage.gradients) and stage.gradients[0] <= now))
        if may_forward and has_input:
            stage.forwarded += 1
            stage.free = now + costs[i].forward
            if i > 0:
                stage.inputs.popleft()
            if i < last:
                stage.link_on = max(stage.link_on, stage.free) + costs[i].message_bytes / network.bandwidth
                stages[i + 1].inputs.append(stage.link_on + network.latency)
                heapq.heappush(wakes, (stage.link_on + network.latency, i + 1))
        elif has_gradient and (eager or not may_forward):
            stage.done += 1
            stage.free = now + costs[i].backward
            if i < last:
                stage.gradients.popleft()
            if i > 0:
                stage.link_back = max(stage.link_back, stage.free) + costs[i - 1].message_bytes / network.bandwidth
                stages[i - 1].gradients.append(stage.link_back + network.latency)
                heapq.heappush(wakes, (stage.link_back + network.latency, i - 1))
            if stage.done % k == 0:
                stage.free += costs[i].step
                stage.steps.append(stage.free)
        else:
            continue
        heapq.heappush(wakes, (stage.free, i))
    return [stage.steps for stage in stages], max(max(s.free, s.link_on, s.link_back) for s in stages)


def least_slack(
    costs: Sequence[StageCost], network: Network, per_update: int = 1, *, stash: bool = True, within: float = 0.05
) -> int:
    """Return the least slack with which a microbatch takes at most ``1 + within`` times what it would without latency.

    Without latency, it takes as long as with ideal links, or as the transfer of the largest message. A slack of about
    the round trip over all links (latencies and transfers) divided by that is enough; the least one is found by
    simulation. Without a stash, stages keep to their order of events, and only multiples of ``P - 1`` help all links.
    """
    stages = len(costs)
    transfers = [c.message_bytes / network.bandwidth for c in costs[:-1]]
    round_trip = 2 * sum(network.latency + transfer for transfer in transfers)
    if round_trip == 0.0:
        return 0
    unit = 1 if stash else stages - 1

    def seconds(links: Network, units: int) -> float:
        run = max(8 * (stages + units * unit), 64) * per_update
        found = simulate("async", costs, links, run, per_update, slack=units * unit, stash=stash)
        return found.seconds_per_microbatch

    need = max([seconds(Network(), 0), *transfers])
    low, high = 0, math.ceil(round_trip / need / unit) + 1 if need else 0
    while low < high:
        middle = (low + high) // 2
        enough = seconds(network, middle) <= (1 + within) * need
        low, high = (low, middle) if enough else (middle + 1, high)
    return low * unit
