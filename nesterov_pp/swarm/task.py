"""What a swarm trains: the stages of a model, their method, and where the data and the rates come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from nesterov_pp.pipeline.delay_models import stage_delays
from nesterov_pp.pipeline.losses import LossFunction
from nesterov_pp.pipeline.recipe import Placement, Recipe, StageOptimizer
from nesterov_pp.pipeline.stage import (
    ParamGroups,
    build_optimizer,
    rates_of_update,
    set_horizon,
    set_learning_rate,
)
from nesterov_pp.stash import WeightStash
from nesterov_pp.swarm.lineage import Update

Batch = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """The training that all processes of a swarm share.

    Attributes:
        recipe: the method.
        stages: number of stages.
        build: ``(stage) -> module``, from 0, always with the same initial weights. It maps a tensor to a tensor.
        loss_fn: ``(output of the last stage, targets) -> 0-d tensor``.
        batch: ``(microbatch) -> (inputs, targets)``.
        rate: ``(gradients of the stage before this update) -> learning rate``.
        boundary: the shape of what each stage hands to the next.
        seed: of random layers.
        versions: how many versions a stage with a stash keeps. A microbatch that is later than that runs its forward
            again, at the newest weights.
        max_grad_norm, param_groups, backend: as for the pipelines.
    """

    recipe: Recipe
    stages: int
    build: Callable[[int], nn.Module]
    loss_fn: LossFunction
    batch: Batch
    rate: Callable[[int], float]
    boundary: tuple[int, ...]
    seed: int
    versions: int = 16
    max_grad_norm: float | None = None
    param_groups: ParamGroups | None = None
    backend: str = "auto"

    @property
    def stashes(self) -> bool:
        """Whether backward differentiates at the weights of its forward."""
        return self.recipe.linearise_at == "version"

    def optimizer(self, stage: int, module: nn.Module, stash: WeightStash) -> StageOptimizer:
        """Return the optimizer of a stage, from 0.

        Raises:
            ValueError: the stage has no trainable parameters.
        """
        place = self.place(stage)
        found = build_optimizer(
            self.recipe,
            module,
            stash,
            place,
            lr=self.rate(0),
            max_grad_norm=self.max_grad_norm,
            backend=self.backend,
            param_groups=self.param_groups,
            seed=self.seed,
        )
        if found is None:
            raise ValueError(f"stage {stage} has no trainable parameters, so there is nothing for a swarm to average")
        return found

    def place(self, stage: int) -> Placement:
        return Placement(stage + 1, self.stages, stage_delays(self.stages, 1)[stage])

    def step(
        self, optimizer: StageOptimizer, stash: WeightStash, update: Update, sums: list[Tensor], counted: int
    ) -> int:
        """Step a stage by an update, with the sums of its gradients.

        Args:
            optimizer: the stage's.
            stash: the stage's ring.
            update: what is stepped.
            sums: for each parameter, the sum of the update's gradients.
            counted: how many gradients the stage has been stepped with before.

        Returns:
            how many gradients the stage has been stepped with now.
        """
        for p, total in zip(stash.parameters(stash.newest).values(), sums, strict=True):
            p.grad = total
        gradients = len(update.contributions)
        set_learning_rate(optimizer, self.rate(counted))
        set_horizon(optimizer, self.recipe, self.place(update.stage), update.number)
        with rates_of_update(optimizer, self.recipe, update.delay, update.number):
            optimizer.step(version=stash.newest, microbatches=gradients)
        return counted + gradients


def check_recipe(recipe: Recipe, stages: int) -> None:
    """Raise ValueError if a swarm cannot train with a method."""
    if not recipe.delayed:
        raise ValueError(f"method {recipe.name!r} waits for its gradients, which a swarm never does")
    own = {
        "forecasts gradients": recipe.forecast is not None,
        "predicts weights": recipe.shadow is not None or recipe.linearise_at == "shadow",
        "needs delays that are constant": recipe.constant_delay,
        "begins synchronously or leaves out late gradients": recipe.synchronous_updates or recipe.max_staleness,
        "sets the microbatches of an update": recipe.accumulation(stages) != 1,
        "has slack, where a swarm has --in-flight": recipe.slack > 0,
    }
    if found := [what for what, is_so in own.items() if is_so]:
        raise ValueError(
            f"method {recipe.name!r} {found[0]}; a swarm trains with swarm, nesterov, nesterov-rotated and others that "
            "only step"
        )
