"""One process of a pipeline with options of the rule, groups, and weights that are frozen for a while.

Usage: options_worker.py FOLDER SCENARIO,... with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy import microbatch, model

from nesterov_pp.pipeline import AsyncPipeline, VirtualPipeline, World, connect, no_decay, recipes

UPDATES, HALF, STAGES = 14, 8, 3
BASE: dict[str, Any] = {"lr": 1e-2, "seed": 7, "max_grad_norm": 0.5}
MASTERS: dict[str, Any] = {"master_weights": True, "param_groups": no_decay, "weight_decay": 0.1}
METHODS = ("nesterov", "nesterov-no-stash", "xpipe", "pipemare", "nesterov-rotated", "gpipe", "dc-asgd")
"""Methods with a stash, without one, with predictions, with rotated steps, with a flush, with a correction."""

LOW: dict[str, dict[str, Any]] = {
    **{f"masters-{name}": {"method": name, **MASTERS} for name in METHODS},
    "rounded": {"method": "nesterov", "stochastic_rounding": True, "state_dtype": torch.bfloat16},
    "small-moments": {"method": "pipedream", **MASTERS, "state_dtype": torch.bfloat16, "betas": (0.8, 0.99)},
}
"""Scenarios with bfloat16 weights."""

WHAT = {
    "a-weight": lambda stage, module: stage == 0 and [module[1].up.weight],
    "first-stage": lambda stage, module: stage == 0 and module.parameters(),
    "middle-stage": lambda stage, module: stage == 1 and module.parameters(),
    "all-but-last": lambda stage, module: stage < STAGES - 1 and module.parameters(),
    "last-stage": lambda stage, module: stage == STAGES - 1 and module.parameters(),
}
FROZEN: dict[str, tuple[str, str, int, int]] = {
    f"frozen-{what}-{method}-{first}-{last}": (what, method, first, last)
    for what, method, first, last in (
        *(("a-weight", method, 3, HALF - 1) for method in METHODS),
        ("a-weight", "nesterov", 5, 11),
        ("a-weight", "nesterov-no-stash", 5, 11),
        ("first-stage", "nesterov", 5, 11),
        ("first-stage", "nesterov-no-stash", 3, HALF - 1),
        ("first-stage", "xpipe", 5, 11),
        ("middle-stage", "gpipe", 5, 11),
        ("all-but-last", "nesterov", 5, 11),
        ("last-stage", "nesterov-rotated", 5, 11),
    )
}
"""Scenarios in which parameters are frozen for some updates: what, with which method, from when to when."""


REPLICAS = "frozen-replicas"
"""The scenario of two replicas of two stages."""
FROZEN_REPLICAS = {REPLICAS: ("a-weight", "nesterov", 3, HALF - 1)}


def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.float(), targets)


def stages_of(name: str) -> list[nn.Module]:
    return model(STAGES, dropout=0.1, dtype=torch.bfloat16 if name in LOW else torch.float32)


def options_of(name: str) -> dict[str, Any]:
    over = {"clip_over": "pipeline"} if "first-stage" in name else {}
    return {**BASE, **over, **(LOW[name] if name in LOW else {"method": FROZEN[name][1]})}


def k_of(name: str) -> int:
    return recipes()[options_of(name)["method"]].accumulation(STAGES)


def freeze(name: str, update: int, stage: int, module: nn.Module) -> None:
    """Freeze or unfreeze the parameters of a stage that a scenario freezes before an update."""
    what, _, first, last = {**FROZEN, **FROZEN_REPLICAS}.get(name, ("", "", -1, -1))
    if update in (first, last):
        for p in WHAT[what](stage, module) or ():
            p.requires_grad_(update == last)


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def expected(name: str) -> dict[str, Any]:
    modules, k = stages_of(name), k_of(name)
    pipe = VirtualPipeline(modules, loss_fn, **options_of(name))
    losses = []
    for m in range(UPDATES * k):
        if m % k == 0:
            for i, module in enumerate(modules):
                freeze(name, m // k, i, module)
        losses.append(float(pipe.step(*microbatch(m))))
    return {"losses": losses, "weights": [stash.weights() for stash in pipe.stashes], "memory": pipe.memory()}


def run(world: World, name: str) -> dict[str, Any]:
    """Save and load half way, in a new pipeline."""
    k, losses = k_of(name), []

    def pipeline() -> AsyncPipeline:
        return AsyncPipeline(stages_of(name), loss_fn, microbatch, UPDATES * k, world, **options_of(name))

    def train(pipe: AsyncPipeline, first: int, last: int) -> None:
        for m in range(first * k, last * k):
            if m % k == 0:
                freeze(name, m // k, pipe.stage, pipe.module)
            loss = pipe.step()
            losses.extend([] if loss is None else [float(loss)])

    pipe = pipeline()
    pipe.keep_for(HALF)
    train(pipe, 0, HALF)
    saved = through_file(pipe.state_dict())
    train(pipe, HALF, UPDATES)  # neighbours wait for its messages
    del losses[HALF * k :]
    pipe = pipeline()
    pipe.load_state_dict(saved)
    train(pipe, HALF, UPDATES)
    return {"losses": losses, "weights": pipe.stash.weights(), "memory": pipe.memory()}


def expected_of_replicas() -> dict[str, Any]:
    """Run one pipeline with microbatches twice as large."""
    modules, losses = model(2), []
    pipe = VirtualPipeline(modules, loss_fn, **BASE)
    for m in range(UPDATES):
        for i, module in enumerate(modules):
            freeze(REPLICAS, m, i, module)
        pairs = zip(microbatch(2 * m), microbatch(2 * m + 1), strict=True)
        losses.append(float(pipe.step(*(torch.cat(pair) for pair in pairs))))
    return {"losses": losses, "weights": [stash.weights() for stash in pipe.stashes]}


def run_replicas(world: World) -> dict[str, Any]:
    pipe = AsyncPipeline(model(2), loss_fn, microbatch, UPDATES, world, replicas=2, bucket_bytes=300, **BASE)
    losses = []
    for m in range(UPDATES):
        freeze(REPLICAS, m, pipe.stage, pipe.module)
        loss = pipe.step()
        losses.extend([] if loss is None else [float(loss)])
    return {"losses": losses, "weights": pipe.stash.weights()}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2].split(",")
    torch.set_num_threads(1)
    with connect(timeout=60) as world:
        for name in names:
            found = run_replicas(world) if name == REPLICAS else run(world, name)
            torch.save(found, folder / f"{name}-{world.rank}.pt")


if __name__ == "__main__":
    main()
