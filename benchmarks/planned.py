"""The times that ``nesterov_pp.planning`` predicts, next to measured ones: ``python -m benchmarks.pipeline --plan``.

Two processes compute, on one core each. Two and four more processes sleep instead of computing, for unequal times, so
that four stages run in parallel on a machine with two cores.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nesterov_pp.pipeline import World
from nesterov_pp.planning import SCHEDULES, Network, StageCost, measure_layers, simulate

SLEEPS = (0.012, 0.009, 0.015, 0.010)
"""The seconds that each stage's forward takes; its backward takes twice as long."""

SIMULATED = 400
Run = Callable[[World, str, list[nn.Module]], float]
"""A function of (world, schedule, stages) that returns milliseconds per microbatch in steady state."""


class _Pause(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        time.sleep(2.0 * ctx.seconds)
        return gradients[0], None


class Sleeping(nn.Module):
    """A stage that sleeps instead of computing, with one parameter to step."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.gain = seconds, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = _Pause.apply(x * self.gain, self.seconds)  # type: ignore[no-untyped-call]
        return output


def sleeping(count: int) -> list[nn.Module]:
    """Return stages that sleep."""
    return [Sleeping(seconds) for seconds in SLEEPS[:count]]


def compare(
    world: World, modules: list[nn.Module], example: Tensor, run: Run, per_update: int, rounds: int
) -> list[dict[str, Any]]:
    """Return the planned and real milliseconds per microbatch of each schedule, with stages measured where they run."""
    found: dict[str, list[tuple[float, float]]] = {schedule: [] for schedule in SCHEDULES}
    for _ in range(rounds):
        costs = _costs(world, modules, example)
        for schedule in SCHEDULES:
            k = 1 if schedule == "async" else per_update
            planned = 1e3 * simulate(schedule, costs, Network(), SIMULATED, k).seconds_per_microbatch
            world.gather(None)
            found[schedule].append((planned, run(world, schedule, modules)))
    medians = {
        name: [statistics.median(values) for values in zip(*pairs, strict=True)] for name, pairs in found.items()
    }
    return [{"schedule": name, "planned": p, "real": r, "rounds": found[name]} for name, (p, r) in medians.items()]


def _costs(world: World, modules: Sequence[nn.Module], example: Tensor) -> list[StageCost]:
    """Return the costs of all stages, each measured by its own process while the others measure theirs."""
    is_last = world.rank == world.size - 1
    world.gather(None)
    (cost,) = measure_layers([modules[world.rank]], example, lambda output: F.mse_loss(output, example), repeats=9)
    if not is_last:
        cost = StageCost(cost.forward, cost.backward, cost.step, example.nbytes, cost.weight_bytes)
    return world.gather(cost)


def rows(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the lines of a table for display, from ``found`` by what the stages do."""
    lines = ["| stages | schedule | planned, ms a microbatch | real | real / planned |", "|---|---|---|---|---|"]
    for what, schedules in found.items():
        for one in schedules:
            ratio = one["real"] / one["planned"]
            lines.append(f"| {what} | {one['schedule']} | {one['planned']:.1f} | {one['real']:.1f} | {ratio:.2f} |")
    return lines
