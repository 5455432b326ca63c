"""The cost of the engine of an asynchronous pipeline, against the same stages called in turn in one process.

Every process holds both pipelines, which take turns every few microbatches, so that other load on the machine affects
both. CPU time is that of the thread that computes; it does not include waiting for a neighbour.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from nesterov_pp.pipeline import AsyncPipeline, VirtualPipeline, World

TURNS, PER_TURN, WARM_UP = 16, 8, 8


def measure(world: World, stages: Callable[[], list[nn.Module]], batch: Any, lr: float) -> list[dict[str, float]]:
    """Return the CPU milliseconds per microbatch of this process in each turn.

    "async" is its stage of the pipeline, "in turn" all stages, and "transfer" one message each way.
    """
    total = WARM_UP + TURNS * PER_TURN + world.size
    pipe = AsyncPipeline(stages(), F.mse_loss, batch, total, world, lr=lr)
    whole = VirtualPipeline(stages(), F.mse_loss, lr=lr, seed=0)
    for m in range(WARM_UP):
        pipe.step()
        whole.step(*batch(m))
    found = []
    for _ in range(TURNS):
        one = {}
        for name, step in (("async", pipe.step), ("in turn", lambda: whole.step(*batch(whole.microbatches)))):
            world.gather(None)
            one[name] = _cpu_ms(step)
        one["transfer"] = _cpu_ms(lambda: _exchange(world, batch(0)[0]))
        found.append(one)
    while pipe.microbatches < total:
        pipe.step()
    return found


def _cpu_ms(act: Callable[[], Any]) -> float:
    begin = time.thread_time()
    for _ in range(PER_TURN):
        act()
    return 1e3 * (time.thread_time() - begin) / PER_TURN


def _exchange(world: World, message: Tensor) -> None:
    """Exchange what two stages send each other in a microbatch: one message each way."""
    other, arrived = 1 - world.rank, torch.empty_like(message)
    works = [dist.isend(message, other), dist.irecv(arrived, other)]
    for work in works:
        assert work is not None
        work.wait()


def costs(found: list[list[dict[str, float]]]) -> dict[str, list[float]]:
    """Return the cost in each turn as a share of the CPU time in turn, from the measurements of two processes.

    "engine" is the cost without the transfer, "with transfer" the cost including it.
    """
    result: dict[str, list[float]] = {"engine": [], "with transfer": []}
    for turn in zip(*found, strict=True):
        whole = statistics.mean(one["in turn"] for one in turn)
        spent, sent = sum(one["async"] for one in turn), sum(one["transfer"] for one in turn)
        result["with transfer"].append(spent / whole - 1.0)
        result["engine"].append((spent - sent) / whole - 1.0)
    return result
