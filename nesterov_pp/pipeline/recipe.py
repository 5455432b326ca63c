"""What a pipeline needs to know of a method, and the register of methods by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from nesterov_pp.pipeline.delay_models import Delays, Fixed, one_forward_one_backward
from nesterov_pp.stash import LineariseAt, Shadow


@dataclass(frozen=True)
class Placement:
    """A stage's place: ``stage`` counts from 1 (input side) to ``stages``; ``delay`` is its tau, expected or fixed."""

    stage: int
    stages: int
    delay: int


Horizon = Callable[[Placement, int, int], float]
"""``(place, update, correction_updates) -> s``: how many updates ahead a stage looks."""


class StageOptimizer(Protocol):
    """Steps the weights of one ``WeightStash``. Its groups take ``"lr"`` and, where it looks ahead, ``"horizon"``."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Hyper-parameters that may change from step to step."""

    @property
    def state(self) -> Mapping[Any, dict[str, Any]]:
        """The state of every parameter, by parameter."""

    def step(self, *, version: int | None = None, microbatches: int = 1) -> None:
        """Take the gradients of a version, the sum over some microbatches, and write the next version."""

    def state_dict(self) -> dict[str, Any]:
        """All of its state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""


class Forecast(Protocol):
    """Replaces a stage's late gradients by a guess of today's."""

    def apply(self, parameters: Sequence[Tensor], delay: int) -> None:
        """Change ``parameters``' gradients, which are ``delay`` updates late, in place."""

    def state_dict(self) -> dict[str, Any]:
        """What the next call depends on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""


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
        linearise_at: where backward differentiates: at the "version" of the forward, at the "newest" weights, or at the
            "shadow" of a ``Discrepancy``.
        microbatches_per_update: K; None for as many as there are stages.
        stage_options: hyper-parameters that depend on the stage.
        lr_factor: ``(delay, update, correction_updates) -> factor`` on the learning rate.
        correction_updates: how many updates ``lr_factor`` or ``horizon`` take to get to their last values (the paper's
            T); None where they do not depend on it.
        delays: ``(stages, K) -> Delays`` of the method's own pipeline.
        horizon: how far ahead each stage looks, where the rule or its prediction does; None: the rule's own way.
        synchronous_updates: how many updates wait for their gradients before delays begin; None: no such option.
        max_staleness: microbatches that are later than this are left out of their update; None: no such option.
        forecast: makes what guesses a stage's gradients.
        constant_delay: whether the method assumes that a stage's delay does not change; it is then told the expected
            delay. The others take every delay as it comes, or do not depend on it.
        distributed: whether ``AsyncPipeline`` runs it too; ``VirtualPipeline`` runs all.
    """

    name: str
    summary: str
    reference: str
    rule: Callable[..., StageOptimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    delayed: bool = True
    linearise_at: LineariseAt = "version"
    microbatches_per_update: int | None = 1
    stage_options: Callable[[Placement], dict[str, Any]] = _no_options
    lr_factor: Callable[[int, int, int], float] = _full_rate
    correction_updates: int | None = None
    delays: Callable[[int, int], Delays] = one_forward_one_backward
    horizon: Horizon | None = None
    synchronous_updates: int | None = None
    max_staleness: int | None = None
    forecast: Callable[[], Forecast] | None = None
    constant_delay: bool = False
    distributed: bool = True

    def accumulation(self, stages: int) -> int:
        """K, the microbatches of an update."""
        return stages if self.microbatches_per_update is None else self.microbatches_per_update

    def delays_of(self, stages: int, microbatches_per_update: int) -> Delays:
        """The delays of the method's own pipeline."""
        return self.delays(stages, microbatches_per_update) if self.delayed else Fixed([0] * stages)

    def check_forward(self, *, recompute: bool, autocast: bool) -> None:
        """Raises: ValueError: the recipe's backward takes other weights than the forward's, and cannot get at them."""
        if self.linearise_at == "version":
            return
        if recompute:
            raise ValueError(f"{self.name!r} keeps activations of older weights, which cannot be recomputed")
        if autocast:
            raise ValueError(
                f"{self.name!r} changes the weights between forward and backward, which the copies that autocast "
                "makes of them would not follow; use a method with a stash, or no autocast"
            )

    @property
    def shadow(self) -> Shadow | None:
        """What a stage's ``WeightStash`` keeps outside the ring."""
        owner = self.options.get("prediction", self.rule)
        shadow: Shadow | None = getattr(owner, "shadow", None)
        return shadow

    def override(self, overrides: Mapping[str, Any]) -> Recipe:
        """This recipe with other hyper-parameters. An override wins over a stage-dependent value.

        ``horizon`` may be a number, one for each stage, or a function as in the recipe.

        Raises:
            ValueError: the recipe has no such hyper-parameter.
        """
        own = {name for name in _OWN if getattr(self, name) is not None}
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
        if "horizon" in changed:
            changed["horizon"] = _as_horizon(changed["horizon"])
        return replace(self, options={**self.options, **options}, stage_options=overridden, **changed)


_OWN = ("correction_updates", "horizon", "synchronous_updates", "max_staleness")


def _as_horizon(value: float | Sequence[float] | Horizon) -> Horizon:
    if callable(value):
        return value
    if isinstance(value, int | float):
        return lambda _place, _update, _t: float(value)
    return lambda place, _update, _t: float(value[place.stage - 1])


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
