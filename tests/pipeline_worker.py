"""One process of an asynchronous pipeline: runs scenarios one after the other and saves each result in a file.

Usage: pipeline_worker.py FOLDER SCENARIO,... with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nests
import torch
import torch_schedules
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from toy import Block, microbatch, model

from nesterov_pp.pipeline import AsyncPipeline, VirtualPipeline, World, connect, recipes
from nesterov_pp.pipeline.distributed.links import Channel
from nesterov_pp.pipeline.distributed.transport import TorchLinks


class HalvedChannel:
    """A custom transport that sends each tensor as two messages."""

    def __init__(self, whole: Channel) -> None:
        self._whole = whole
        self.next_to_post, self.waited, self.backlog = 0, 0.0, 0

    @property
    def marked(self) -> bool:
        return self._whole.marked

    @marked.setter
    def marked(self, marked: bool) -> None:
        self._whole.marked = marked
        self._whole.backlog = self.backlog

    def send(self, microbatch: int, tensors: Sequence[torch.Tensor]) -> None:
        self._whole.send(microbatch, _halves(tensors))

    def post(self, microbatch: int, tensors: Sequence[torch.Tensor]) -> None:
        self._whole.post(microbatch, _halves(tensors))
        self.next_to_post = microbatch + 1

    def arrived(self) -> bool:
        return self._whole.arrived()

    def take(self, microbatch: int) -> None:
        self._whole.take(microbatch)

    def finish(self) -> None:
        self._whole.finish()


def _halves(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [half for tensor in tensors for half in tensor.view(-1).chunk(2)]


class HalvedLinks(TorchLinks):
    def __init__(self, world: World, replicas: int) -> None:
        super().__init__(world, replicas)
        for name in ("inputs", "outputs", "overflow_in", "overflow_out", "gradients_in", "gradients_out"):
            channel = getattr(self, name)
            setattr(self, name, None if channel is None else HalvedChannel(channel))


UPDATES, REPLICATED_UPDATES = 100, 40
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
    "checkpointed": {"checkpoint": True},
    "far-ahead": {"receive_ahead": 3},
    "slack": {"slack": 3},
    "slack-jitter": {"slack": 5},
    "slack-two-per-update": {"slack": 3, "microbatches_per_update": 2},
    "slack-drained-over-all": {"slack": 2, "flush_every": 11, "clip_over": "pipeline"},
    "slack-own-links": {"slack": 2, "links": HalvedLinks},
    "bfloat16-wire": {"wire": "bfloat16", "slack": 2},
    "int8-wire": {"wire": "int8"},
    "int8-wire-weighed": {"wire": "int8", "microbatches_per_update": 2, "clip_over": "pipeline"},
    "slack-no-stash": {"slack": 2, "method": "nesterov-no-stash", "correction_updates": 40},
    "not-ahead": {"receive_ahead": 0},
    "jitter": {},
    "own-links": {"links": HalvedLinks},
    "clipped-over-all": {"clip_over": "pipeline"},
    "differences": {"old_versions": "8bit-differences"},
    "differences-recomputed": {"old_versions": "8bit-differences", "recompute": True},
    "differences-drained": {"old_versions": "8bit-differences", "flush_every": 11},
    "differences-compensated": {"old_versions": "8bit-differences", "method": "dc-asgd"},
    "differences-eight-bit": {"old_versions": "8bit-differences", "state_dtype": "8bit"},
    "rounded": {"old_versions": "bfloat16"},
    "no-stash-two-per-update": {"method": "nesterov-no-stash", "microbatches_per_update": 2, "correction_updates": 40},
}
ONLY_ASYNC = ("recompute", "receive_ahead", "checkpoint", "links")


TWO_REPLICAS: dict[str, dict[str, Any]] = {
    "replicas": {},
    "replicas-in-small-buckets": {"bucket_bytes": 300},
    "replicas-two-per-update": {"microbatches_per_update": 2, "bucket_bytes": 300},
    "replicas-weighted": {},
    "replicas-weighted-two-per-update": {"microbatches_per_update": 2},
    "replicas-clipped-over-all": {"clip_over": "pipeline"},
    "replicas-no-stash": {"method": "nesterov-no-stash", "correction_updates": 40},
    "sharded": {"method": "nesterov-no-stash", "correction_updates": 40},
    "sharded-two-per-update": {"method": "nesterov-no-stash", "correction_updates": 40, "microbatches_per_update": 2},
    "sharded-in-part": {"method": "nesterov-no-stash", "correction_updates": 40, "bucket_bytes": 300},
}
SHAPES = ("tuples", "frozen", "frozen-first", "bfloat16", "by-parameters", "by-time", *nests.SCENARIOS)


def with_labels(m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a microbatch of which one to five labels are valid."""
    x, y = microbatch(m)
    return x, torch.where(torch.arange(len(y)) <= m % 5, y, nests.IGNORED)


def sum_and_weight(output: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = F.cross_entropy(output, targets, ignore_index=nests.IGNORED, reduction="sum")
    return total, (targets != nests.IGNORED).sum()


def k_of(options: dict[str, Any]) -> int:
    return int(options.get("microbatches_per_update", 4 if options.get("method") == "gpipe" else 1))


def expected(stages: int, name: str) -> dict[str, Any]:
    """Return the losses and final weights of the virtual pipeline."""
    options = {k: v for k, v in SCENARIOS[name].items() if k not in ONLY_ASYNC}
    if "old_versions" in options:  # then recomputation changes the losses, because it runs at decoded weights
        options["recompute"] = SCENARIOS[name].get("recompute", False)
    modules = model(stages, dropout=0.1, dtype=torch.float32)
    pipe = VirtualPipeline(modules, F.cross_entropy, **{**BASE, **options})
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
    options = dict(SCENARIOS[name])
    total = UPDATES * k_of(options)
    modules = model(world.size, dropout=0.1, dtype=torch.float32)
    if "checkpoint" in options:
        del options["checkpoint"]
        checkpoint_blocks(modules)
    pipe = AsyncPipeline(modules, F.cross_entropy, microbatch, total, world, **{**BASE, **options})
    if name.endswith("jitter"):
        slow_down(pipe.module, random.Random(world.rank))
    losses, validations = [], []
    for m in range(total):
        pipe.lr = rate(m)
        loss = pipe.step()
        losses += [] if loss is None else [float(loss)]
        if m % 50 == 49:
            validation = pipe.evaluate(*microbatch(-1))
            validations += [] if validation is None else [float(validation)]
    return {
        "losses": losses,
        "validations": validations,
        "weights": pipe.module.state_dict(),
        "waited": pipe.waited,
        "memory": pipe.memory(),
        "delay": pipe.delay,
    }


def run_replicas(world: World, name: str) -> dict[str, Any]:
    """Run two replicas of two stages on alternate microbatches."""
    options = TWO_REPLICAS[name]
    total = REPLICATED_UPDATES * k_of(options)
    stage: nn.Module = model(2, dtype=torch.float64)[world.rank % 2]
    if name.startswith("sharded"):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "stage"))["replica"]
        for layer in stage.modules():
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        stage = stage if name == "sharded-in-part" else fully_shard(stage, mesh=mesh)
    loss_fn, batch = (sum_and_weight, with_labels) if "weighted" in name else (F.cross_entropy, microbatch)
    pipe = AsyncPipeline(stage, loss_fn, batch, total, world, replicas=2, **BASE, **options)
    losses = [float(loss) for _ in range(total) if (loss := pipe.step()) is not None]
    weights = pipe.module.state_dict()
    refusal = ""
    try:
        if name.startswith("sharded"):
            pipe.save("not written")
    except ValueError as error:
        refusal = str(error)
    return {
        "losses": losses,
        "exported": pipe.export(),
        "refusal": refusal,
        "weights": {n: w.full_tensor() if isinstance(w, DTensor) else w for n, w in weights.items()},
    }


def expected_of_replicas(name: str) -> dict[str, Any]:
    """Run one pipeline with microbatches twice as large."""
    options = {k: v for k, v in TWO_REPLICAS[name].items() if k != "bucket_bytes"}
    modules = model(2, dtype=torch.float64)
    loss_fn, batch = (sum_and_weight, with_labels) if "weighted" in name else (F.cross_entropy, microbatch)
    pipe = VirtualPipeline(modules, loss_fn, **BASE, **options)
    losses = []
    for m in range(REPLICATED_UPDATES * k_of(options)):
        pairs = zip(batch(2 * m), batch(2 * m + 1), strict=True)
        losses.append(float(pipe.step(*(torch.cat(pair) for pair in pairs))))
    return {"losses": losses, "weights": [m.state_dict() for m in modules]}


def methods() -> list[str]:
    """Return the names of the methods that also run in several processes."""
    return [name for name, recipe in recipes().items() if recipe.distributed]


def run_methods(world: World, _: str) -> dict[str, Any]:
    """Return the losses and weights of a short run with each of ``methods``."""
    found: dict[str, Any] = {}
    for name in methods():
        total = 24 * recipes()[name].accumulation(world.size)
        modules = model(world.size, dropout=0.1, dtype=torch.float32)
        pipe = AsyncPipeline(modules, F.cross_entropy, microbatch, total, world, name, **BASE)
        losses = [float(loss) for _ in range(total) if (loss := pipe.step()) is not None]
        found[name] = {"losses": losses, "weights": pipe.stash.weights()}
    return found


def expected_of_method(name: str, stages: int) -> dict[str, Any]:
    modules = model(stages, dropout=0.1, dtype=torch.float32)
    pipe = VirtualPipeline(modules, F.cross_entropy, name, **BASE)
    losses = [float(pipe.step(*microbatch(m))) for m in range(24 * pipe.microbatches_per_update)]
    return {"losses": losses, "weights": [stash.weights() for stash in pipe.stashes]}


def run_on_gpus(world: World, _: str) -> dict[str, Any]:
    """Run every stage on its own GPU."""
    torch.cuda.set_device(world.rank)
    modules = model(world.size, dropout=0.1, dtype=torch.float32)
    device = f"cuda:{world.rank}"
    pipe = AsyncPipeline(modules, F.cross_entropy, microbatch, UPDATES, world, device=device, **BASE)
    losses = [float(loss) for _ in range(UPDATES) if (loss := pipe.step()) is not None]
    return {"losses": losses, "weights": {n: w.cpu() for n, w in pipe.module.state_dict().items()}}


def expected_on_gpu(stages: int) -> dict[str, Any]:
    modules = [m.cuda() for m in model(stages, dropout=0.1, dtype=torch.float32)]
    pipe = VirtualPipeline(modules, F.cross_entropy, **BASE)
    losses = [float(pipe.step(*(t.cuda() for t in microbatch(m)))) for m in range(UPDATES)]
    return {"losses": losses, "weights": [m.cpu().state_dict() for m in modules]}


class WithSkip(nn.Module):
    """A stage that returns its output, a skip connection, and a count that needs no gradient."""

    def __init__(self, stage: nn.Module, last: bool) -> None:
        super().__init__()
        self.stage, self.last = stage, last

    def forward(
        self, x: torch.Tensor, skip: torch.Tensor | None = None, count: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...] | torch.Tensor:
        y = self.stage(x if skip is None else x + 0.5 * skip.tanh())
        if self.last:
            return y
        count = torch.ones(3, dtype=torch.int64) if count is None else count + 1
        return y, (y if skip is None else skip + y * count[0]), count


class Autocast(nn.Module):
    """A stage that computes in bfloat16."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output: torch.Tensor = self.stage(x)
            return output


def bfloat16_loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(output, targets)


def shaped(name: str, stages: int) -> tuple[Any, dict[str, Any]]:
    """Return a model and the options for its pipeline."""
    if name in nests.SCENARIOS:
        return nests.model(), nests.SCENARIOS[name]
    modules = model(stages, dropout=0.1, dtype=torch.float32)
    if name == "tuples":
        return [WithSkip(m, k == stages - 1) for k, m in enumerate(modules)], {}
    if name in ("frozen", "frozen-first"):
        modules[name == "frozen"].requires_grad_(False)
        return modules, {}
    if name == "bfloat16":
        return modules, {"autocast": torch.bfloat16}
    layers = nn.Sequential(*(layer for m in modules for layer in (m if isinstance(m, nn.Sequential) else [m])))
    return layers, {"partition": name.removeprefix("by-").replace("time", "parameters")}


def run_shaped(world: World, name: str) -> dict[str, Any]:
    modules, options = shaped(name, world.size)
    if name == "by-time":
        options = {"partition": "time"}
    loss_fn, batch = loss_and_data(name, F.cross_entropy)
    pipe = AsyncPipeline(modules, loss_fn, batch, 60, world, **{**BASE, **options})
    losses = [float(loss) for _ in range(60) if (loss := pipe.step()) is not None]
    outputs = pipe.predict(batch(99)[0]) if name != "frozen" else torch.zeros(0)
    return {"losses": losses, "outputs": outputs, "weights": list(pipe.module.parameters())}


def expected_of_shaped(name: str, stages: int) -> dict[str, Any]:
    modules, options = shaped(name, stages)
    loss_fn, batch = loss_and_data(name, F.cross_entropy)
    if name == "bfloat16":
        modules, loss_fn, options = [Autocast(m) for m in modules], bfloat16_loss, {}
    if "partition" in options:
        options = {"partition": stages}
    pipe = VirtualPipeline(modules, loss_fn, **{**BASE, **options})
    losses = [float(pipe.step(*batch(m))) for m in range(60)]
    weights = [list(stage.parameters()) for stage in pipe.stages]
    return {"losses": losses, "outputs": pipe.predict(batch(99)[0]), "weights": weights}


def loss_and_data(name: str, otherwise: Any) -> tuple[Any, Any]:
    """Return the loss function and the data of a model of ``shaped``."""
    if name not in nests.SCENARIOS:
        return otherwise, microbatch
    return (nests.sum_and_weight if name in ("nests-weighted", "nests-clipped") else nests.mean), nests.batch


def checkpoint_blocks(modules: list[nn.Module]) -> None:
    """Keep no activations in the blocks: wrap them in ``torch.utils.checkpoint`` inside the stages."""
    for block in (part for module in modules for part in module.modules() if isinstance(part, Block)):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def slow_down(module: nn.Module, draw: random.Random) -> None:
    """Pause at random in forwards and backwards; timing must not change results."""

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
            others = {
                **dict.fromkeys(TWO_REPLICAS, run_replicas),
                **dict.fromkeys(SHAPES, run_shaped),
                "gpus": run_on_gpus,
                "methods": run_methods,
                **torch_schedules.PLAYS,
            }
            act = others.get(name, run)
            torch.save(act(world, name), folder / f"{name}-{world.rank}.pt")


if __name__ == "__main__":
    main()
