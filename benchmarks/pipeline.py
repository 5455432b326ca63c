"""Measure the pipeline across processes: ``python -m benchmarks.pipeline [--json FILE] [--plan | --network | ...]``.

Two processes, each pinned to a core of its own with one thread, alternate between the asynchronous pipeline and torch's
own GPipe and 1F1B on the same two stages. Every peer is measured in every round, so that other load on the machine
affects all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nesterov_pp as npp
from benchmarks import engine, network, timeline
from benchmarks import planned as plan
from nesterov_pp.pipeline import AsyncPipeline, World, connect
from nesterov_pp.training.model import Block

STAGES, PER_FLUSH = 2, 4
WIDTH, HEADS, CONTEXT, BATCH, BLOCKS = 256, 4, 128, 4, 2
WARM_UP, MEASURED, ROUNDS = 8, 20, 12
LR = 1e-4


def stages(count: int = STAGES) -> list[nn.Module]:
    """Return stages of the same blocks, so that they are balanced."""
    torch.manual_seed(0)
    return [nn.Sequential(*(Block(WIDTH, HEADS, 0.0) for _ in range(BLOCKS))) for _ in range(count)]


def batch(m: int) -> tuple[Tensor, Tensor]:
    """Return noise as input and target; the gradient of the input is not needed."""
    return _noise(m % 8)


@cache
def _noise(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, CONTEXT, WIDTH, generator=torch.Generator().manual_seed(seed))
    return x, x.roll(1, 1)


def asynchronous(world: World, modules: list[nn.Module]) -> dict[str, float]:
    """Return the milliseconds per microbatch and the share of waiting of this stage, in steady state."""
    total = WARM_UP + MEASURED + world.size
    pipe = AsyncPipeline(modules, F.mse_loss, batch, total, world, lr=LR)
    for _ in range(WARM_UP):
        pipe.step()
    begin, waited = time.perf_counter(), pipe.waited
    for _ in range(MEASURED):
        pipe.step()
    seconds = time.perf_counter() - begin
    found = {"ms": 1e3 * seconds / MEASURED, "wait": (pipe.waited - waited) / seconds}
    while pipe.microbatches < total:
        pipe.step()
    return found


def synchronous(world: World, name: str, modules: list[nn.Module]) -> dict[str, float]:
    """Return the milliseconds per microbatch of one of torch's schedules, with an update after every flush."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    module, last = modules[world.rank], world.size - 1
    optimizer = npp.NAdam(module.parameters(), lr=LR)
    stage = PipelineStage(module, world.rank, world.size, torch.device("cpu"))
    schedule = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}[name](stage, PER_FLUSH, loss_fn=F.mse_loss)

    def flush(k: int) -> None:
        xs, ys = zip(*(batch(m) for m in range(k * PER_FLUSH, (k + 1) * PER_FLUSH)), strict=True)
        inputs = (torch.cat(xs),) if world.rank == 0 else ()
        schedule.step(*inputs, target=torch.cat(ys) if world.rank == last else None, return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()

    for k in range(WARM_UP // PER_FLUSH):
        flush(k)
    begin = time.perf_counter()
    for k in range(MEASURED // PER_FLUSH):
        flush(k)
    return {"ms": 1e3 * (time.perf_counter() - begin) / MEASURED}


def memory(world: World) -> dict[str, float]:
    """Return the bytes that a stage holds at its peak, the bytes by the formula, and the delay."""
    wide, count = 768, world.size
    # A small pipeline first, for what is loaded once and not counted.
    small = AsyncPipeline(stages(count), F.mse_loss, batch, count, world, lr=LR)
    while small.microbatches < small.total:
        small.step()
    del small
    before = _resident()
    block = nn.Sequential(Block(wide, 12, 0.0), Block(wide, 12, 0.0))

    def data(m: int) -> tuple[Tensor, Tensor]:
        return torch.ones(4, 256, wide), torch.zeros(4, 256, wide)

    pipe = AsyncPipeline(block, F.mse_loss, data, 4 * count, world, lr=LR)
    parameters = sum(p.numel() * p.element_size() for p in block.parameters())
    kept = _activations(block, data(0)[0])
    Path("/proc/self/clear_refs").write_text("5")
    while pipe.microbatches < pipe.total:
        pipe.step()
    moments, gradients = 2 * parameters, parameters
    formula = (pipe.delay + 1) * (parameters + kept) + moments + gradients
    return {"measured": _highest() - before, "formula": formula, "delay": pipe.delay}


def _activations(module: nn.Module, x: Tensor) -> int:
    """Return the bytes that autograd keeps for one microbatch, including its input but not the weights."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    seen: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # without detach(), a saved output would keep itself alive

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = module(x.requires_grad_())
    return sum(seen.values()) + int(output.numel() * output.element_size())


def _resident() -> int:
    return _status("VmRSS")


def _highest() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(name))
    return int(line.split()[1]) * 1024


def planned(world: World, what: str) -> list[dict[str, Any]]:
    """Return the planned times and those that processes take, for stages that compute or sleep."""
    modules = stages(world.size) if what == "compute" else plan.sleeping(world.size)

    def run(world: World, schedule: str, modules: list[nn.Module]) -> float:
        if schedule == "async":
            return asynchronous(world, modules)["ms"]
        return synchronous(world, {"gpipe": "GPipe", "1f1b": "1F1B"}[schedule], modules)["ms"]

    return plan.compare(world, modules, batch(0)[0], run, PER_FLUSH, 3)


def traced(world: World) -> list[Any]:
    """Return the events of a short run."""
    pipe = AsyncPipeline(stages(world.size), F.mse_loss, batch, 24, world, lr=LR, timeline=True)
    while pipe.microbatches < pipe.total:
        pipe.step()
    return [event for events in world.gather(pipe.timeline.events) for event in events]


def worker(folder: Path, what: str) -> None:
    """Run one process, which writes its results to a file."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    found: Any
    with connect() as world:
        if what == "memory":
            found = memory(world)
        elif what == "trace":
            found = traced(world)
        elif what in ("compute", "sleep"):
            found = planned(world, what)
        else:
            peers: dict[str, Callable[[], dict[str, float]]] = {
                "async": lambda: asynchronous(world, stages()),
                "GPipe": lambda: synchronous(world, "GPipe", stages()),
                "1F1B": lambda: synchronous(world, "1F1B", stages()),
            }
            found = {name: [] for name in peers}
            for k in range(ROUNDS):  # alternately forwards and backwards, in case the machine gets slower or faster
                for name, peer in list(peers.items())[:: 1 if k % 2 else -1]:
                    world.gather(None)
                    found[name].append(peer())
            found["engine"] = engine.measure(world, stages, batch, LR)
    (folder / f"{rank}.json").write_text(json.dumps(found))


def run(what: str, processes: int) -> list[Any]:
    """Run the processes and return the results of each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # Freed blocks go back to the system, so that resident memory is memory in use.
        quiet = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        extra = quiet if what == "memory" else {"OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.pipeline", "--worker", what, "--folder", folder],
                env={**os.environ, **place, **extra, "RANK": str(rank)},
            )
            for rank in range(processes)
        ]
        if any(process.wait() for process in started):
            raise SystemExit("a process failed; see its output above")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]


def table(found: list[Any], held: list[Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the lines of a table for display, and the numbers in them: medians over rounds."""

    def rounds(name: str, key: str, rank: int = STAGES - 1) -> list[float]:
        return [one[key] for one in found[rank][name]]

    def median(values: list[float]) -> float:
        return statistics.median(values)

    ms = {name: median(rounds(name, "ms")) for name in ("async", "GPipe", "1F1B")}
    # The slower stage is the one that waits less.
    waits = [min(one) for one in zip(*(rounds("async", "wait", r) for r in range(STAGES)), strict=True)]
    costs = engine.costs([one["engine"] for one in found])
    aim = 0.95 * (PER_FLUSH + STAGES - 1) / PER_FLUSH
    ratios = {
        name: median([s / a for s, a in zip(rounds(name, "ms"), rounds("async", "ms"), strict=True)])
        for name in ("GPipe", "1F1B")
    }
    rows = ["| measured | aim | found |", "|---|---|---|"]
    rows.append(f"| waiting of the slower stage, share of the time | <= 3 % | {_spread(waits, 100)} % |")
    for name, ratio in ratios.items():
        rows.append(f"| microbatches a second, async / torch's {name} | >= {aim:.2f} | {ratio:.2f} |")
    what = "CPU time of both stages, over that of the same in turn"
    rows.append(f"| {what}, beyond the transfer | <= 3 % | {_spread(costs['engine'], 100)} % |")
    rows.append(f"| {what}, with the transfer | | {_spread(costs['with transfer'], 100)} % |")
    rows.append(memory_row(held))
    numbers = {"ms": ms, "waits": waits, "ratios": ratios, "costs": costs, "memory": held}
    shown = ", ".join(f"{name} {value:.1f}" for name, value in ms.items())
    return [*rows, "", f"Median ms a microbatch: {shown}."], numbers


def memory_row(held: list[Any]) -> str:
    """Return the row of the memory."""
    found = ", ".join(f"{h['measured'] / h['formula'] - 1:+.1%} (delay {h['delay']:.0f})" for h in held)
    return f"| memory of a stage over (tau + 1) (weights + activations) + moments + gradients | within 5 % | {found} |"


def _spread(values: list[float], scale: float) -> str:
    """Return the median and the quartiles as text."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{scale * middle:.1f} ({scale * low:.1f} to {scale * high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file (default: none)")
    parser.add_argument(
        "--plan", action="store_true", help="only compare the times that `plan` predicts with real ones"
    )
    parser.add_argument("--memory", action="store_true", help="only measure the memory of four stages")
    parser.add_argument("--network", action="store_true", help="only compare `plan` with real times on slow links")
    parser.add_argument(
        "--trace", type=Path, help="only draw a timeline into this folder, with one stage per core but at most four"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.folder, arguments.worker)
        return
    if arguments.network:
        network.main(arguments.json)
        return
    if arguments.trace:
        timeline.write(run("trace", min(4, len(os.sched_getaffinity(0))))[0], arguments.trace)
        return
    if arguments.plan:
        both = {f"{n}, {what}": run(what, n)[-1] for what, n in (("compute", 2), ("sleep", 2), ("sleep", 4))}
        print("\n".join(plan.rows(both)))
        if arguments.json:
            arguments.json.write_text(json.dumps(both, indent=1) + "\n")
        return
    if arguments.memory:
        print(memory_row(run("memory", 4)))
        return
    rows, numbers = table(run("peers", STAGES), run("memory", 4))
    print(f"2 stages of {BLOCKS} blocks of width {WIDTH}, microbatches of {BATCH} x {CONTEXT}; ", end="")
    print(f"{ROUNDS} rounds of {MEASURED} microbatches, one core a process, torch {torch.__version__}")
    print("\n".join(["", *rows]))
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
