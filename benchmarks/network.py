"""The pipeline over slow links, next to what ``plan`` predicts: ``python -m benchmarks.pipeline --network``.

Every stage is a process on a host of its own (``benchmarks.hosts``), and sleeps instead of computing, so that few cores
do for many stages. Latency and bandwidth change between runs of the same processes.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch.nn import functional as F

from benchmarks.hosts import Hosts, missing
from benchmarks.planned import Sleeping
from nesterov_pp.pipeline import AsyncPipeline, World, connect
from nesterov_pp.pipeline.wire import message_bytes
from nesterov_pp.planning import Network, StageCost, least_slack, simulate

LATENCIES = (0.0, 0.005, 0.020, 0.100)
BANDWIDTHS = (80e6 / 8, 1e9 / 8)
STAGES = (2, 4)
PER_FLUSH, MEASURED, SIMULATED = 4, 24, 400
SCHEDULES = ("async", "async with slack", "1f1b", "torch's gpipe", "torch's 1f1b")
"""The waiting 1F1B is that of method gpipe here. torch's schedules post each receive only when they need it."""


class Work(NamedTuple):
    """What is measured: a schedule of stages that take ``forward`` seconds forward and twice as long backward.

    ``values`` is the number of float32 numbers of a message, ``wire`` their format on the way. ``settle`` microbatches
    run before the measured ones: TCP finds out slowly what a link carries.
    """

    schedule: str
    forward: float = 0.020
    values: int = 16_384
    slack: int = 0
    wire: str | None = None
    settle: int = 0

    def costs(self, stages: int) -> list[StageCost]:
        size = message_bytes(4 * self.values, torch.float32, self.wire)
        return [StageCost(self.forward, 2 * self.forward, 0.0, size)] * stages


THIN = [Work("async with slack", 0.005, 262_144, wire=wire, settle=48) for wire in (None, "bfloat16", "int8")]
"""Work whose messages take longer than its computing on the thinner links."""


def timed(world: World, work: Work) -> tuple[float, float]:
    """Return the seconds of a microbatch in steady state, and the share of waiting."""
    x = torch.randn(work.values, generator=torch.Generator().manual_seed(0))
    fill = 4 * (world.size + work.slack) + work.settle
    total = fill + MEASURED + 4 * -(-work.slack // 4)  # full for as long as the time is taken
    options: dict[str, Any] = {"slack": work.slack} if work.slack else {}
    method = "gpipe" if work.schedule == "1f1b" else "nesterov"
    stage = Sleeping(work.forward)
    pipe = AsyncPipeline(
        stage, F.mse_loss, lambda _: (x, x), total, world, method, lr=1e-6, wire=cast(Any, work.wire), **options
    )
    for _ in range(fill):
        pipe.step()
    begin, waited = time.perf_counter(), pipe.waited
    for _ in range(MEASURED):
        pipe.step()
    seconds = time.perf_counter() - begin
    found = seconds / MEASURED, (pipe.waited - waited) / seconds
    while pipe.microbatches < pipe.total:
        pipe.step()
    return found


def flushed(world: World, work: Work) -> tuple[float, float]:
    """Return the seconds of a microbatch in one of torch's schedules, and the share of the time without computing."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    module = Sleeping(work.forward)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)
    stage = PipelineStage(module, world.rank, world.size, torch.device("cpu"))
    kind = {"torch's gpipe": ScheduleGPipe, "torch's 1f1b": Schedule1F1B}[work.schedule]
    run, last = kind(stage, PER_FLUSH, loss_fn=F.mse_loss), world.size - 1
    x = torch.randn(PER_FLUSH, work.values, generator=torch.Generator().manual_seed(0))

    def flush() -> None:
        run.step(*((x,) if world.rank == 0 else ()), target=x if world.rank == last else None, return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()

    flush()
    begin, times = time.perf_counter(), max(1, MEASURED // PER_FLUSH // 2)
    for _ in range(times):
        flush()
    each = (time.perf_counter() - begin) / (times * PER_FLUSH)
    return each, 1 - 3 * work.forward / each


def worker() -> None:
    """Run one stage: for every line on the first one's standard input, one measurement, which the first one prints."""
    torch.set_num_threads(1)
    with connect(timeout=60.0) as world:
        while line := world.agreed(sys.stdin.readline):
            work = Work(*json.loads(line))
            rows = world.gather(flushed(world, work) if work.schedule.startswith("torch") else timed(world, work))
            if world.rank == 0:
                print(json.dumps({"seconds": rows[-1][0], "waiting": [row[1] for row in rows]}), flush=True)


def measure(
    stages: int, networks: Sequence[Network], works: Sequence[Work], report: Callable[[dict[str, Any]], None]
) -> None:
    """Measure everything on every network; ``report`` is called with each result."""
    with Hosts(stages) as hosts:
        command = ["-m", "benchmarks.network"]
        others = [hosts.start(k, command, stdin=subprocess.DEVNULL) for k in range(1, stages)]
        first = hosts.start(0, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert first.stdin is not None
        assert first.stdout is not None
        try:
            for network, work in itertools.product(networks, works):
                hosts.set(network.latency, network.bandwidth)
                if work.schedule == "async with slack":
                    work = work._replace(slack=least_slack(work.costs(stages), network))
                    if not work.slack and work.wire is None and len(works) == len(SCHEDULES):
                        continue
                first.stdin.write(json.dumps(work) + "\n")
                first.stdin.flush()
                line = first.stdout.readline()
                if not line:
                    raise SystemExit("a process failed; see its output above")
                planned = {"stages": stages, **work._asdict(), **predicted(stages, network, work)}
                report({**planned, **json.loads(line)})
            first.stdin.close()
            for process in (first, *others):
                process.wait()
        finally:
            for process in (first, *others):
                process.kill()


def predicted(stages: int, network: Network, work: Work) -> dict[str, Any]:
    """Return what the simulation behind ``plan`` says."""
    name, k = work.schedule.removeprefix("torch's "), PER_FLUSH
    if name.startswith("async"):
        name, k = "async", 1
    found = simulate(name, work.costs(stages), network, SIMULATED, k, slack=work.slack)
    return {
        "latency": network.latency,
        "bandwidth": network.bandwidth,
        "planned": found.seconds_per_microbatch,
        "planned_waiting": found.waiting,
    }


HEADINGS = ("stages", "latency, ms", "Mbit/s", "schedule", "planned, ms a microbatch", "real", "real / planned")
HEADER = [f"| {' | '.join(HEADINGS)} | waiting, planned | real |", "|--:|--:|--:|---|--:|--:|--:|--:|--:|"]


def row(one: dict[str, Any]) -> str:
    """Return the line of a table for one measurement; waiting is that of the stage that waits least."""
    name = f"async, slack {one['slack']}" if one["slack"] else one["schedule"].removesuffix(" with slack")
    name += f", {one['wire']}" if one["wire"] else ""
    links = f"| {one['stages']} | {1e3 * one['latency']:g} | {one['bandwidth'] * 8 / 1e6:g} | {name} "
    times = f"| {1e3 * one['planned']:.1f} | {1e3 * one['seconds']:.1f} | {one['seconds'] / one['planned']:.2f} "
    return links + times + f"| {min(one['planned_waiting']):.0%} | {max(0.0, min(one['waiting'])):.0%} |"


def main(path: Path | None) -> None:
    """Measure all networks and print a table; also write the numbers to a file, if there is a path."""
    if why := missing():
        raise SystemExit(f"no hosts can be made on this machine: {why}")
    found: list[dict[str, Any]] = []

    def report(one: dict[str, Any]) -> None:
        found.append(one)
        print(row(one), flush=True)

    usual, thin = Work("async"), THIN[0]
    print(f"Stages sleep {1e3 * usual.forward:g} ms forward, twice as long backward; {usual.values} float32 a message.")
    print(f"In the last rows, {1e3 * thin.forward:g} ms and {thin.values}.")
    print("\n".join(["", *HEADER]), flush=True)
    networks = [Network(latency, bandwidth) for bandwidth in BANDWIDTHS for latency in LATENCIES]
    for stages in STAGES:
        measure(stages, networks, [Work(schedule) for schedule in SCHEDULES], report)
    measure(2, [Network(0.005, BANDWIDTHS[0])], THIN, report)
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    worker()
