"""The functions that stages of every pipeline share: optimizer, learning rate, random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from nesterov_pp.pipeline.recipe import Placement, Recipe, StageOptimizer
from nesterov_pp.pipeline.tensors import device_of
from nesterov_pp.stash import WeightStash


def build_stash(recipe: Recipe, module: nn.Module, versions: int) -> WeightStash:
    """Return the ring of a stage's weights, with the recipe's shadow if it has one."""
    return WeightStash(module, versions, shadow=recipe.shadow)


def build_optimizer(
    recipe: Recipe,
    module: nn.Module,
    stash: WeightStash,
    placement: Placement,
    *,
    lr: float,
    max_grad_norm: float | None,
    backend: str,
) -> StageOptimizer | None:
    """Return the recipe's optimizer for a stage's trainable parameters; None if there are none."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        return None
    options = {**recipe.options, **recipe.stage_options(placement)}
    return recipe.rule(trainable, lr=lr, stash=stash, max_grad_norm=max_grad_norm, backend=backend, **options)


def set_learning_rate(optimizer: StageOptimizer, recipe: Recipe, delay: int, update: int, lr: float) -> None:
    """Set the learning rate of every group for an update on a stage with the given delay."""
    factor = recipe.lr_factor(delay, update, recipe.correction_updates or 1)
    for group in optimizer.param_groups:
        group["lr"] = lr * factor


def set_horizon(optimizer: StageOptimizer, recipe: Recipe, place: Placement, update: int) -> None:
    """Set the horizon of every group for an update, if the recipe has one."""
    if recipe.horizon is None:
        return
    horizon = recipe.horizon(place, update, recipe.correction_updates or 1)
    for group in optimizer.param_groups:
        group["horizon"] = horizon


def run_stage(module: nn.Module, hidden: Any) -> Any:
    """Return the output of a stage. A tuple from the previous stage is passed as separate arguments."""
    return module(*hidden) if isinstance(hidden, tuple) else module(hidden)


def autocasting(module: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return a ``torch.autocast`` context for ``dtype`` on the stage's device; with None, one that does nothing."""
    return nullcontext() if dtype is None else torch.autocast(device_of(module).type, dtype)


def microbatch_seed(seed: int, stage: int, microbatch: int) -> int:
    """Return the seed of the random state in which a stage (from 0) runs a microbatch's forward."""
    return (seed * 1_000_003 + stage) * 1_000_000_007 + microbatch & 0x7FFF_FFFF_FFFF_FFFF


@contextmanager
def random_state(module: nn.Module, seed: int | None, stage: int, microbatch: int) -> Iterator[None]:
    """Make random layers depend on (seed, stage, microbatch) alone; without a seed, on the global random state."""
    if seed is None:
        yield
        return
    devices = sorted({p.device for p in module.parameters() if p.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices=devices):
        own = microbatch_seed(seed, stage, microbatch)
        # torch.manual_seed would also record itself, with a stack trace, for every device type that is not in use.
        torch.default_generator.manual_seed(own)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(own)
        yield
