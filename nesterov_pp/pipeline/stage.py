"""The functions that stages of every pipeline share: optimizer, learning rate, random state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from nesterov_pp.optim.options import EIGHT_BIT
from nesterov_pp.pipeline.recipe import Placement, Recipe, StageOptimizer
from nesterov_pp.pipeline.recompute import Recomputed
from nesterov_pp.pipeline.tensors import device_of
from nesterov_pp.stash import OldVersions, WeightStash

ParamGroups = Callable[[nn.Module], Sequence[dict[str, Any]]]
"""``(stage) -> groups`` for the optimizer of a stage, with every trainable parameter in one of them.

A group's ``"lr_scale"`` multiplies the learning rate of the run; its other entries are options of the rule.
"""


def build_stash(
    recipe: Recipe,
    module: nn.Module,
    versions: int,
    old_versions: OldVersions = "full",
    *,
    exact_forward: bool = False,
) -> WeightStash:
    """Return the ring of a stage's weights, with the recipe's shadow if it has one.

    Raises:
        ValueError: the recipe uses no older versions, but ``old_versions`` is not "full"; or as for ``WeightStash``.
    """
    recipe.check_old_versions(old_versions)
    return WeightStash(module, versions, shadow=recipe.shadow, old_versions=old_versions, exact_forward=exact_forward)


def build_optimizer(
    recipe: Recipe,
    module: nn.Module,
    stash: WeightStash,
    placement: Placement,
    *,
    lr: float,
    max_grad_norm: float | None,
    backend: str,
    param_groups: ParamGroups | None = None,
    seed: int | None = None,
) -> StageOptimizer | None:
    """Return the recipe's optimizer for a stage's trainable parameters; None if there are none.

    ``seed`` (default: 0) and the number of the stage determine how a rule with ``stochastic_rounding`` rounds.

    Raises:
        ValueError: the groups do not hold every trainable parameter once, or have an option that the rule's groups do
            not have, or the recipe's rule takes no groups.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if param_groups is not None:
        recipe.check_groups()
    if not trainable:
        return None
    options = {**recipe.options, **recipe.stage_options(placement)}
    if options.get("stochastic_rounding") or options.get("state_dtype") == EIGHT_BIT:
        options = {"seed": ((seed or 0) * 1_000_003 + placement.stage) & 0xFFFF_FFFF_FFFF_FFFF, **options}
    parameters: Sequence[Any] = trainable if param_groups is None else _groups(module, param_groups, lr)
    optimizer = recipe.rule(parameters, lr=lr, stash=stash, max_grad_norm=max_grad_norm, backend=backend, **options)
    if param_groups is not None:
        _check_options(recipe, optimizer)
    return optimizer


def _check_options(recipe: Recipe, optimizer: StageOptimizer) -> None:
    """Refuse options of groups that the rule would not look at."""
    known = set(getattr(optimizer, "defaults", {}))
    if known and "state_dtype" in recipe.rule_options:
        known.add("state_dtype")
    found = {name for group in optimizer.param_groups for name in group} - {"params", "param_names", "lr_scale"}
    unknown = sorted(found - known) if known else []
    if not unknown:
        return
    if unknown[0] in recipe.rule_options:
        raise ValueError(f"{unknown[0]} is not an option of one group; give it to the pipeline, for all parameters")
    raise ValueError(
        f"method {recipe.name!r} has no option {unknown[0]!r} for a group; it has lr_scale, {', '.join(sorted(known))}"
    )


def _groups(module: nn.Module, param_groups: ParamGroups, lr: float) -> list[dict[str, Any]]:
    """Return the groups with named parameters, by which their state can be told apart in a checkpoint."""
    groups = [
        {"lr": lr * group.get("lr_scale", 1.0), **group, "params": list(group["params"])}
        for group in param_groups(module)
    ]
    times = Counter(id(p) for group in groups for p in group["params"])
    names = {id(p): name for name, p in module.named_parameters()}
    for name, p in module.named_parameters():
        if times[id(p)] != int(p.requires_grad):
            found = "trainable and in" if p.requires_grad else "frozen, but in"
            raise ValueError(
                f"param_groups must hold every trainable parameter of a stage once, and no other; {name} is {found} "
                f"{times[id(p)]} of them"
            )
    return [{**group, "params": [(names[id(p)], p) for p in group["params"]]} for group in groups if group["params"]]


class Trained:
    """Which parameters of a stage require gradients, checked not to change in the middle of an update.

    The microbatches of an update that are in flight in a process of a pipeline have run forward before the change, and
    those of the emulation have not, so that their gradients would be parts of the update in one of them only.
    """

    def __init__(self) -> None:
        self._then: list[bool] = []

    def check(self, stash: WeightStash, waiting: int) -> None:
        """Check a microbatch of an update for which ``waiting`` others have been taken.

        Raises:
            ValueError: parameters were frozen or unfrozen since the first microbatch of the update.
        """
        newest = stash.parameters(stash.newest)
        now = [p.requires_grad for p in newest.values()]
        if waiting and now != self._then:
            changed = next(n for n, before, after in zip(newest, self._then, now, strict=True) if before != after)
            raise ValueError(
                f"{changed} was frozen or unfrozen after {waiting} microbatch(es) of an update; undo it, and do it "
                "between two updates"
            )
        self._then = now


@contextmanager
def named_stage(stage: int) -> Iterator[None]:
    """Say in a ``ValueError`` from inside the block which stage (from 0) it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"stage {stage}: {error}") from None


def set_learning_rate(optimizer: StageOptimizer, lr: float) -> None:
    """Set the learning rate of every group to ``lr`` times its ``"lr_scale"``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


@contextmanager
def rates_of_update(optimizer: StageOptimizer, recipe: Recipe, delay: int, update: int) -> Iterator[None]:
    """Multiply the groups' learning rates by the recipe's factor for a delay and an update, inside the block.

    Outside, they are those that the pipeline or a scheduler has set, from which a scheduler may compute the next ones.
    """
    factor = recipe.lr_factor(delay, update, recipe.correction_updates or 1)
    groups = optimizer.param_groups if factor != 1.0 else []
    rates = [group["lr"] for group in groups]
    try:
        for group, lr in zip(groups, rates, strict=True):
            group["lr"] = lr * factor
        yield
    finally:
        for group, lr in zip(groups, rates, strict=True):
            group["lr"] = lr


def set_horizon(optimizer: StageOptimizer, recipe: Recipe, place: Placement, update: int) -> None:
    """Set the horizon of every group for an update, if the recipe has one."""
    if recipe.horizon is None:
        return
    horizon = recipe.horizon(place, update, recipe.correction_updates or 1)
    for group in optimizer.param_groups:
        group["horizon"] = horizon


def run_stage(module: Callable[..., Any], hidden: Any) -> Any:
    """Return the output of a stage. A tuple is passed as its arguments, a mapping as its keyword arguments.

    An ``nn.Sequential`` takes one argument, whatever it is, as its layers do.
    """
    inner = module.module if isinstance(module, Recomputed) else module
    if getattr(type(inner), "forward", None) is nn.Sequential.forward:
        return module(hidden)
    if isinstance(hidden, tuple):
        return module(*hidden)
    return module(**hidden) if isinstance(hidden, Mapping) else module(hidden)


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
