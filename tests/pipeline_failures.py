"""Run one process of a pipeline in which something goes wrong: ``pipeline_failures.py WHAT TIMEOUT [PID]``.

Print the exception that the process raised, and end with status 1.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy import microbatch, model

from nesterov_pp.pipeline import AsyncPipeline, World, connect

AT = 20


def batch(m: int) -> Any:
    if m == AT:
        raise StopIteration
    return microbatch(m)


def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
    if torch.equal(targets, microbatch(AT)[1]):
        raise ArithmeticError("no loss today")
    return F.cross_entropy(output, targets)


class SlowAtFirst(nn.Module):
    """A stage that is compiled in its first forward, or seems so."""

    def __init__(self, stage: nn.Module, seconds: float) -> None:
        super().__init__()
        self.stage, self.seconds = stage, seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        self.seconds = 0.0
        return self.stage(x)


def build(what: str, world: World) -> AsyncPipeline:
    """Return a pipeline in which something will go wrong, or is wrong from the start."""
    stages: Any = model(world.size, dtype=torch.float32)
    loss, data, options = F.cross_entropy, microbatch, {}
    if what == "tied":
        stages[-1][1].weight = stages[0][0].weight
    if what in ("tied", "copied"):
        if what == "copied":
            stages[-1][1].weight = nn.Parameter(stages[0][0].weight.detach().clone())
        options["keep"] = stages
        stages = stages[world.rank]
    elif what == "settings":
        options["seed"] = world.rank
    elif what == "slow-at-first":
        stages[1] = SlowAtFirst(stages[1], 6.0)
    elif what == "loss":
        loss = loss_fn
    elif what == "batch":
        data = batch
    kept = options.pop("keep", None)
    pipe = AsyncPipeline(stages, loss, data, 100, world, **options)
    pipe.kept = kept  # type: ignore[attr-defined]
    return pipe


def go_wrong(what: str, pipe: AsyncPipeline) -> None:
    if what == "weights":
        with torch.no_grad():
            for p in pipe.module.parameters():
                p.fill_(float("inf"))
    elif what == "death":
        os._exit(9)
    elif what in ("hanging", "freezing"):
        if what == "freezing":
            os.kill(int(sys.argv[3]), signal.SIGSTOP)
        time.sleep(600)
    elif what == "exception":
        raise KeyError("no such thing")


def bad_arguments(world: World) -> None:
    modules = model(world.size, dtype=torch.float32)
    for stages, options in (
        (modules[:-1], {}),
        (modules, {"replicas": 2}),
        (modules, {"receive_ahead": -1}),
        (modules, {"microbatches_per_update": 7}),
        (modules, {"method": "nesterov-no-stash", "recompute": True}),
        (torch.nn.Sequential(*modules), {"partition": "luck"}),
        (torch.nn.Sequential(modules[0]), {"partition": "parameters"}),
        ([*modules[:-1], modules[0]], {}),
    ):
        try:
            AsyncPipeline(stages, F.cross_entropy, microbatch, 100, world, **options)
        except ValueError as error:
            print(f"refused: {error}", flush=True)
    pipe = AsyncPipeline(modules, F.cross_entropy, microbatch, 3, world, method="gpipe-1")
    saved = pipe.state_dict()
    for foreign in (
        {**saved, "terms": {**saved["terms"], "method": "other"}},
        {**saved, "stages": {}},
        {**saved, "terms": {**saved["terms"], "delays": [9]}},
        {"state": {}, "param_groups": []},
    ):
        try:
            pipe.load_state_dict(foreign)
        except ValueError as error:
            print(f"refused: {error}", flush=True)
    while pipe.microbatches < 3:
        pipe.step()
    for act in (pipe.step, lambda: pipe.load_state_dict(saved)):
        try:
            act()
        except ValueError as error:
            print(f"refused: {error}", flush=True)


def main() -> None:
    what, timeout = sys.argv[1], float(sys.argv[2])
    torch.set_num_threads(1)
    begin = time.monotonic()
    try:
        with connect(timeout) as world:
            if what == "arguments":
                bad_arguments(world)
                return
            pipe = build(what, world)
            for m in range(100):
                if m == AT and world.rank == 1:
                    go_wrong(what, pipe)
                begin = time.monotonic()
                pipe.step()
    except Exception as error:
        print(f"{type(error).__name__}: {error} [{time.monotonic() - begin:.1f} s]", flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
