"""One process of an asynchronous pipeline: runs scenarios one after the other and leaves what came of each in a file.

Usage: pipeline_worker.py FOLDER SCENARIO,... with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from toy import microbatch, model

from nesterov_pp.pipeline import AsyncPipeline, VirtualPipeline, World, connect

UPDATES = 100
BASE: dict[str, Any] = {"lr": 3e-3, "seed": 7, "max_grad_norm": 0.5}
SCENARIOS: dict[str, dict[str, Any]] = {
    "nesterov": {"method": "nesterov"},
    "no-stash": {"method": "nesterov-no-stash", "correction_updates": 40},
    "pipedream-lr": {"method": "pipedream-lr", "correction_updates": 40},
    "two-per-update": {"microbatches_per_update": 2},
    "three-per-update": {"microbatches_per_update": 3},
    "drained": {"flush_every": 11},
    "drained-two-per-update": {"flush_every": 7, "microbatches_per_update": 2},
    "synchronous": {"method": "gpipe"},
    "synchronous-1": {"method": "gpipe-1"},
    "recomputed": {"recompute": True},
    "far-ahead": {"receive_ahead": 3},
    "not-ahead": {"receive_ahead": 0},
    "jitter": {},
    "no-stash-two-per-update": {"method": "nesterov-no-stash", "microbatches_per_update": 2, "correction_updates": 40},
}
ONLY_ASYNC = ("recompute", "receive_ahead")


def k_of(options: dict[str, Any]) -> int:
    return int(options.get("microbatches_per_update", 4 if options.get("method") == "gpipe" else 1))


def expected(stages: int, name: str) -> dict[str, Any]:
    """Losses and final weights of the virtual pipeline."""
    options = {k: v for k, v in SCENARIOS[name].items() if k not in ONLY_ASYNC}
    modules = model(stages, dropout=0.1, dtype=torch.float32)
    pipe = VirtualPipeline(modules, F.cross_entropy, **BASE, **options)
    losses, validations = [], []
    for m in range(UPDATES * k_of(options)):
        pipe.lr = rate(m)
        losses.append(float(pipe.step(*microbatch(m))))
        if m % 50 == 49:
            validations.append(float(pipe.evaluate(*microbatch(-1))))
    return {"losses": losses, "validations": validations, "weights": [m.state_dict() for m in modules]}


def rate(m: int) -> float:
    return float(BASE["lr"]) / (1 + m / 40)


def run(world: World, name: str) -> dict[str, Any]:
    options = SCENARIOS[name]
    total = UPDATES * k_of(options)
    modules = model(world.size, dropout=0.1, dtype=torch.float32)
    pipe = AsyncPipeline(modules, F.cross_entropy, microbatch, total, world, **BASE, **options)
    if name == "jitter":
        slow_down(pipe.module, random.Random(world.rank))
    losses, validations = [], []
    for m in range(total):
        pipe.lr = rate(m)
        loss = pipe.step()
        losses += [] if loss is None else [float(loss)]
        if m % 50 == 49:
            validation = pipe.evaluate(*microbatch(-1))
            validations += [] if validation is None else [float(validation)]
    return {"losses": losses, "validations": validations, "weights": pipe.module.state_dict(), "waited": pipe.waited}


def slow_down(module: nn.Module, draw: random.Random) -> None:
    """Timing must not change results."""

    def pause(*_: Any) -> None:
        time.sleep(draw.uniform(0.0, 0.004))

    module.register_forward_pre_hook(pause)
    for p in module.parameters():
        if p.dim() > 1:
            p.register_post_accumulate_grad_hook(pause)


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2].split(",")
    torch.set_num_threads(1)
    with connect(timeout=60) as world:
        for name in names:
            torch.save(run(world, name), folder / f"{name}-{world.rank}.pt")


if __name__ == "__main__":
    main()
