"""Pipelines driven by torch's own, unchanged schedules: an independent check of the asynchronous pipeline.

``Schedule1F1B`` over one long segment runs forwards and backwards in the order of PipeDream. A stage that steps its
optimizer inside ``backward_one_chunk`` turns it into an asynchronous pipeline, using public names only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F
from toy import microbatch, model

from nesterov_pp import NAdam, WeightStash
from nesterov_pp.pipeline import VirtualPipeline, World, recipes, stage_delays
from nesterov_pp.pipeline.stage import random_state

SEGMENT, FLUSHES, PER_FLUSH = 60, 20, 4
SETTINGS: dict[str, Any] = {"lr": 3e-3, "max_grad_norm": 0.5}
SEED = 7


class Stepping(PipelineStage):
    """A stage that steps after every backward and runs every forward with the version that follows from its delay."""

    def __init__(self, module: torch.nn.Module, world: World) -> None:
        super().__init__(module, world.rank, world.size, torch.device("cpu"))
        self.delay = stage_delays(world.size)[world.rank]
        self.stash = WeightStash(module, self.delay + 1)
        options = {**recipes()["nesterov"].options, **SETTINGS}
        self.optimizer = NAdam(module.parameters(), stash=self.stash, **options)
        self.own, self.trained = module, False

    def forward_one_chunk(self, chunk: int, *args: Any, **kwargs: Any) -> Any:
        if not self.trained:
            return super().forward_one_chunk(chunk, *args, **kwargs)
        with self.stash.use(max(0, chunk - self.delay)), random_state(self.own, SEED, self.stage_index, chunk):
            return super().forward_one_chunk(chunk, *args, **kwargs)

    def backward_one_chunk(self, chunk: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(chunk, *args, **kwargs)
        self.optimizer.step(version=max(0, chunk - self.delay))


def _microbatches(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = zip(*(microbatch(m) for m in range(first, first + count)), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def _play(schedule: Any, world: World, first: int, count: int) -> list[float]:
    inputs, targets = _microbatches(first, count)
    losses: list[torch.Tensor] = []
    is_last = world.rank == world.size - 1
    schedule.step(
        *([inputs] if world.rank == 0 else []),
        **({"target": targets, "losses": losses} if is_last else {}),
        return_outputs=False,
    )
    return [float(loss) for loss in losses]


def asynchronous(world: World, _: str) -> dict[str, Any]:
    module = model(world.size, dropout=0.1, dtype=torch.float32)[world.rank]
    stage = Stepping(module, world)
    stage.trained = True
    schedule = Schedule1F1B(stage, SEGMENT, loss_fn=F.cross_entropy, scale_grads=False)
    losses = _play(schedule, world, 0, SEGMENT)
    return {"losses": losses, "weights": stage.stash.weights()}


def expected_asynchronous(stages: int) -> dict[str, Any]:
    pipe = VirtualPipeline(model(stages, dropout=0.1, dtype=torch.float32), F.cross_entropy, seed=SEED, **SETTINGS)
    return _outcome(pipe, SEGMENT)


def flushing(kind: Callable[..., Any]) -> Callable[[World, str], dict[str, Any]]:
    def play(world: World, _: str) -> dict[str, Any]:
        module = model(world.size, dtype=torch.float32)[world.rank]
        optimizer = recipes()["gpipe"].rule(module.parameters(), **recipes()["gpipe"].options, **SETTINGS)
        stage = PipelineStage(module, world.rank, world.size, torch.device("cpu"))
        schedule = kind(stage, PER_FLUSH, loss_fn=F.cross_entropy)
        losses = []
        for k in range(FLUSHES):
            losses += _play(schedule, world, k * PER_FLUSH, PER_FLUSH)
            optimizer.step()
            optimizer.zero_grad()
        return {"losses": losses, "weights": dict(module.named_parameters())}

    return play


def expected_flushing(stages: int) -> dict[str, Any]:
    pipe = VirtualPipeline(model(stages, dtype=torch.float32), F.cross_entropy, "gpipe", **SETTINGS)
    return _outcome(pipe, FLUSHES * PER_FLUSH)


def _outcome(pipe: VirtualPipeline, microbatches: int) -> dict[str, Any]:
    losses = [float(pipe.step(*microbatch(m))) for m in range(microbatches)]
    return {"losses": losses, "weights": [stash.weights() for stash in pipe.stashes]}


PLAYS = {
    "torch-1f1b-never-flushed": asynchronous,
    "torch-1f1b": flushing(Schedule1F1B),
    "torch-gpipe": flushing(ScheduleGPipe),
}
EXPECTED = {
    "torch-1f1b-never-flushed": expected_asynchronous,
    "torch-1f1b": expected_flushing,
    "torch-gpipe": expected_flushing,
}
