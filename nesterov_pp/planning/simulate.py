"""An event-by-event simulation of a pipeline's schedule, with given times of stages and links."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nesterov_pp.pipeline.delay_models import stage_delays
from nesterov_pp.pipeline.schedule import forward_limit
from nesterov_pp.planning.layers import StageCost

SCHEDULES = ("async", "gpipe", "1f1b")
Event = tuple[str, int]
"""An event: ("forward" or "backward", microbatch) or ("step", update), counted from 0."""


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
        delays = [0] * stages
    elif delays is None:
        delays = stage_delays(stages, per_update)
    queues = [
        list(_events(schedule, stages - 1 - i, delay, microbatches, per_update))
        for i, delay in zip(range(stages), delays, strict=True)
    ]
    finished, busy_until, links = _play(queues, costs, network)
    half = updates // 2
    begin = [finished[i]["step", half - 1] for i in range(stages)]
    end = [finished[i]["step", updates - 1] for i in range(stages)]
    work = [(updates - half) * (per_update * (c.forward + c.backward) + c.step) for c in costs]
    spans = [e - b for b, e in zip(begin, end, strict=True)]
    return Simulated(
        seconds_per_microbatch=(end[-1] - begin[-1]) / ((updates - half) * per_update),
        utilisation=sum(work) / sum(spans) if sum(spans) else 1.0,
        waiting=[max(0.0, 1 - w / span) if span else 0.0 for w, span in zip(work, spans, strict=True)],
        seconds=max(*busy_until, *links, 0.0),
    )


def _events(schedule: str, ahead: int, delay: int, microbatches: int, k: int) -> Iterator[Event]:
    """Yield the events of a stage in order. ``ahead`` is the number of stages after it."""
    forwarded = 0
    for m in range(microbatches):
        limit = m // k * k + k - 1
        if schedule != "gpipe":
            limit = forward_limit(
                m, ahead=ahead, delay=delay, microbatches_per_update=k, flush_every=None, stop=microbatches
            )
        while forwarded <= limit:
            yield "forward", forwarded
            forwarded += 1
        yield "backward", m
        if (m + 1) % k == 0:
            yield "step", m // k


def _play(
    queues: list[list[Event]], costs: Sequence[StageCost], network: Network
) -> tuple[list[dict[Event, float]], list[float], list[float]]:
    """Return when each event of each stage ends, and when stages and links finish their last one."""
    stages = len(costs)
    finished: list[dict[Event, float]] = [{} for _ in range(stages)]
    arrived: list[dict[Event, float]] = [{} for _ in range(stages)]
    now, done = [0.0] * stages, [0] * stages
    link = [0.0] * (2 * stages)  # when the links to the next and to the previous stage are free again
    ready = list(range(stages))
    while ready:
        i = ready.pop()
        while done[i] < len(queues[i]):
            event = queues[i][done[i]]
            kind = event[0]
            source = i - 1 if kind == "forward" else i + 1
            waits = kind != "step" and 0 <= source < stages
            if waits and event not in arrived[i]:
                break
            cost = {"forward": costs[i].forward, "backward": costs[i].backward, "step": costs[i].step}[kind]
            now[i] = max(now[i], arrived[i].pop(event) if waits else 0.0) + cost
            finished[i][event] = now[i]
            done[i] += 1
            to = {"forward": i + 1, "backward": i - 1}.get(kind, -1)
            if 0 <= to < stages:
                way = 2 * i + (kind == "backward")
                size = costs[min(i, to)].message_bytes
                link[way] = max(link[way], now[i]) + size / network.bandwidth
                arrived[to][event] = link[way] + network.latency
                ready.append(to)
    return finished, now, link
