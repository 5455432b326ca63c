"""What a pipeline needs to know of a method, and the register of methods by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nesterov_pp.optim import FusedOptimizer
from nesterov_pp.stash import Backward


@dataclass(frozen=True)
class Placement:
    """A stage's place: ``stage`` counts from 1 (input side) to ``stages``; ``delay`` is its tau."""

    stage: int
    stages: int
    delay: int


def _no_options(_: Placement) -> dict[str, Any]:
    return {}


def _full_rate(_delay: int, _update: int, _correction_updates: int) -> float:
    return 1.0


@dataclass(frozen=True)
class Recipe:
    """A published way to live with late gradients, as a choice among existing parts.

    Attributes:
        name, summary, reference: for people.
        rule: the optimizer class.
        options: its hyper-parameters; each can be overridden.
        delayed: False for a schedule that waits for its gradients (every delay is 0).
        backward: "stashed" differentiates at the version of the forward; "newest" linearises at the current weights.
        microbatches_per_update: K.
        stage_options: hyper-parameters that depend on the stage.
        lr_factor: ``(delay, update, correction_updates) -> factor`` on the learning rate.
        correction_updates: how many updates ``lr_factor`` takes to reach 1 (the paper's T).
    """

    name: str
    summary: str
    reference: str
    rule: Callable[..., FusedOptimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    delayed: bool = True
    backward: Backward = "stashed"
    microbatches_per_update: int = 1
    stage_options: Callable[[Placement], dict[str, Any]] = _no_options
    lr_factor: Callable[[int, int, int], float] = _full_rate
    correction_updates: int | None = None

    def override(self, overrides: Mapping[str, Any]) -> Recipe:
        """This recipe with other hyper-parameters. An override wins over a stage-dependent value.

        Raises:
            ValueError: the recipe has no such hyper-parameter.
        """
        own = {"correction_updates"} if self.correction_updates is not None else set()
        sample = self.stage_options(Placement(1, 1, 0))
        known = own | set(self.options) | set(sample)
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise ValueError(
                f"method {self.name!r} has no hyper-parameter {unknown[0]!r}; it has {', '.join(sorted(known))}"
            )
        options = {k: v for k, v in overrides.items() if k not in own}
        stage_options = self.stage_options

        def overridden(placement: Placement) -> dict[str, Any]:
            return {k: v for k, v in stage_options(placement).items() if k not in options}

        changed = {k: overrides[k] for k in own & set(overrides)}
        return replace(self, options={**self.options, **options}, stage_options=overridden, **changed)


_recipes: dict[str, Recipe] = {}


def register(recipe: Recipe) -> Recipe:
    """Make a recipe known by its name.

    Raises:
        ValueError: the name is taken.
    """
    if recipe.name in _recipes:
        raise ValueError(f"a method named {recipe.name!r} is registered already")
    _recipes[recipe.name] = recipe
    return recipe


def recipes() -> dict[str, Recipe]:
    """All registered recipes by name, in the order of registration."""
    return dict(_recipes)


def find_recipe(method: str | Recipe) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(method, Recipe):
        return method
    if method not in _recipes:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(_recipes)}")
    return _recipes[method]
