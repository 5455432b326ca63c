"""Recipes: what a pipeline needs to know about a method, and the registry of methods by name."""

from __future__ import annotations

import inspect
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from nesterov_pp.optim.base import FusedOptimizer
from nesterov_pp.pipeline.delay_models import Delays, Fixed, one_forward_one_backward, stage_delays
from nesterov_pp.stash import LineariseAt, OldVersions, Shadow


@dataclass(frozen=True)
class Placement:
    """The position of a stage. ``stage`` counts from 1 (input side) to ``stages``; ``delay`` is its tau, expected or
    fixed.
    """

    stage: int
    stages: int
    delay: int


Horizon = Callable[[Placement, int, int], float]
"""``(place, update, correction_updates) -> s``, the number of updates that a stage looks ahead."""


class StageOptimizer(Protocol):
    """An optimizer that steps the weights of one ``WeightStash``. Its parameter groups accept ``"lr"`` and, if it looks
    ahead, ``"horizon"``.
    """

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups, whose hyper-parameters may change from step to step."""

    @property
    def state(self) -> Mapping[Any, dict[str, Any]]:
        """The state of every parameter, keyed by parameter."""

    def step(self, *, version: int | None = None, microbatches: int = 1) -> None:
        """Apply the gradients of ``version``, summed over ``microbatches``, and write the next version."""

    def state_dict(self) -> dict[str, Any]:
        """Return the complete state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned."""


class Forecast(Protocol):
    """An estimator that replaces a stage's late gradients by estimates of the current ones."""

    def apply(self, parameters: Sequence[Tensor], delay: int) -> None:
        """Replace the gradients of ``parameters``, which are ``delay`` updates late."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the next call depends on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned."""


def _no_options(_: Placement) -> dict[str, Any]:
    return {}


def _full_rate(_delay: int, _update: int, _correction_updates: int) -> float:
    return 1.0


@dataclass(frozen=True)
class Recipe:
    """A published method for training with late gradients, as a choice among existing parts.

    Attributes:
        name, summary, reference: for display.
        rule: the optimizer class.
        options: hyper-parameters of the rule; each can be overridden.
        delayed: False for a schedule that waits for its gradients (every delay is 0).
        linearise_at: the weights at which backward differentiates: the "version" of the forward, the "newest" weights,
            or the "shadow" of a ``Discrepancy``.
        microbatches_per_update: K; None for as many as there are stages.
        slack: further microbatches in flight, which hide the latency of slow links (``stage_delays``).
        stage_options: hyper-parameters that depend on the stage.
        lr_factor: ``(delay, update, correction_updates) -> factor`` by which the learning rate is multiplied.
        correction_updates: number of updates until ``lr_factor`` or ``horizon`` reach their final values (the paper's
            T); None if they do not depend on it.
        delays: ``(stages, K) -> Delays``, the delays of the method's own pipeline.
        horizon: how far ahead each stage looks, if the rule or its prediction looks ahead; None for the rule's default.
        synchronous_updates: number of updates that wait for their gradients before delays begin; None if the method has
            no such option.
        max_staleness: microbatches that are later than this are left out of their update; None if the method has no
            such option.
        forecast: creates the ``Forecast`` that estimates a stage's gradients; None for no forecast.
        constant_delay: whether the method assumes that a stage's delay is constant; if so, it is given the expected
            delay. Other methods take every delay as it comes, or do not depend on it.
        distributed: whether ``AsyncPipeline`` supports the recipe; ``VirtualPipeline`` supports every recipe.
    """

    name: str
    summary: str
    reference: str
    rule: Callable[..., StageOptimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    delayed: bool = True
    linearise_at: LineariseAt = "version"
    microbatches_per_update: int | None = 1
    slack: int = 0
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
        """Return K, the number of microbatches per update."""
        return stages if self.microbatches_per_update is None else self.microbatches_per_update

    def delays_of(self, stages: int, microbatches_per_update: int) -> Delays:
        """Return the delays of the method's own pipeline."""
        if not self.delayed:
            return Fixed([0] * stages)
        if self.slack:
            return Fixed(stage_delays(stages, microbatches_per_update, self.slack))
        return self.delays(stages, microbatches_per_update)

    @property
    def decodes_whole_versions(self) -> bool:
        """Whether a ring that keeps older versions in a short form also needs the memory of a whole one.

        So it is for corrections, which read older weights, and for rules that do not step in one pass over everything.
        """
        in_one_pass = isinstance(self.rule, type) and issubclass(self.rule, FusedOptimizer)
        return not in_one_pass or not {"correction", "prediction"}.isdisjoint(self.options)

    def check_forward(self, *, recompute: bool, autocast: bool) -> None:
        """Check that the recipe's backward can reach the weights that it differentiates at.

        Raises:
            ValueError: backward uses other weights than forward, which ``recompute`` or ``autocast`` prevents.
        """
        if self.linearise_at == "version":
            return
        if recompute:
            raise ValueError(f"{self.name!r} keeps activations of older weights, which cannot be recomputed")
        if autocast:
            raise ValueError(
                f"{self.name!r} changes the weights between forward and backward, but the copies that autocast makes "
                "of the weights would not change with them; use a method with a stash, or turn autocast off"
            )

    @property
    def takes_slack(self) -> bool:
        """Whether the method can have ``slack``: its gradients come as late as those of the pipeline, or later."""
        return self.delayed and self.delays is one_forward_one_backward

    def _check_slack(self, slack: object) -> None:
        if not isinstance(slack, int) or isinstance(slack, bool) or slack < 0:
            raise ValueError(f"slack must be a whole number of at least 0, not {slack!r}")
        if slack and not self.delayed:
            raise ValueError(f"method {self.name!r} waits for its gradients, so it has no slack; omit it")
        if slack and not self.takes_slack:
            raise ValueError(f"method {self.name!r} has delays of its own, to which slack cannot add; omit it")

    def check_old_versions(self, old_versions: OldVersions) -> None:
        """Raise ValueError if older versions are to be kept in another form, but the recipe keeps none."""
        if old_versions != "full" and self.linearise_at == "newest":
            raise ValueError(
                f"method {self.name!r} keeps no older versions of the weights, so none can be kept as {old_versions}; "
                "omit old_versions, or use a method with a stash"
            )

    def check_groups(self) -> None:
        """Raise ValueError if the rule takes no parameter groups."""
        if not getattr(self.rule, "takes_groups", True):
            raise ValueError(f"method {self.name!r} takes no param_groups; its rule groups the parameters itself")

    @property
    def rule_options(self) -> set[str]:
        """Those of ``RULE_OPTIONS`` that the rule takes."""
        return set(RULE_OPTIONS) & set(inspect.signature(self.rule).parameters)

    @property
    def family(self) -> str:
        """The family of the rule. Only methods of one family show what a delay costs; others compare rules as well."""
        found: str = _FAMILY_OF_BASE.get(self.options.get("base", ""), getattr(self.rule, "family", "other"))
        return found

    @property
    def shadow(self) -> Shadow | None:
        """The shadow that a stage's ``WeightStash`` keeps outside the ring; None without one."""
        owner = self.options.get("prediction", self.rule)
        shadow: Shadow | None = getattr(owner, "shadow", None)
        return shadow

    def override(self, overrides: Mapping[str, Any]) -> Recipe:
        """Return this recipe with other hyper-parameters. An override takes precedence over a stage-dependent value.

        ``horizon`` may be a number, a sequence with one number per stage, or a function as in the recipe. Every recipe
        has ``microbatches_per_update`` and ``slack``, and those of ``RULE_OPTIONS`` that its rule takes.

        Raises:
            ValueError: the recipe does not have one of the hyper-parameters, ``microbatches_per_update`` is not a whole
                number of at least 1, or ``slack`` not one that the recipe's delays can have.
        """
        own = {"microbatches_per_update", "slack"} | {name for name in _OWN if getattr(self, name) is not None}
        sample = self.stage_options(Placement(1, 1, 0))
        known = own | set(self.options) | set(sample)
        unknown = sorted(set(overrides) - known - self.rule_options)
        if unknown and unknown[0] in RULE_OPTIONS:
            rule = getattr(self.rule, "__name__", "its rule")
            raise ValueError(f"method {self.name!r} has no {unknown[0]}, because {rule} has no such option; omit it")
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
        k = changed.get("microbatches_per_update", 1)
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"microbatches_per_update must be a whole number of at least 1, not {k!r}")
        self._check_slack(changed.get("slack", 0))
        return replace(self, options={**self.options, **options}, stage_options=overridden, **changed)


_FAMILY_OF_BASE = {"muon": "muon", "basis-rotation": "rotated"}
RULE_OPTIONS = ("state_dtype", "master_weights", "stochastic_rounding", "on_nonfinite", "maximize")
"""Options that a recipe need not list: they reach its rule if the rule has them."""

_OWN = ("correction_updates", "horizon", "synchronous_updates", "max_staleness")


def _as_horizon(value: float | Sequence[float] | Horizon) -> Horizon:
    if callable(value):
        return value
    if isinstance(value, int | float):
        return lambda _place, _update, _t: float(value)
    return lambda place, _update, _t: float(value[place.stage - 1])


_recipes: dict[str, Recipe] = {}


def register(recipe: Recipe) -> Recipe:
    """Register a recipe under its name, and return it.

    Raises:
        ValueError: the name is already registered.
    """
    if recipe.name in _recipes:
        raise ValueError(f"a method named {recipe.name!r} is registered already")
    _recipes[recipe.name] = recipe
    return recipe


def recipes() -> dict[str, Recipe]:
    """Return all registered recipes by name, in the order of registration."""
    return dict(_recipes)


def find_recipe(method: str | Recipe) -> Recipe:
    """Return the recipe with a name; a ``Recipe`` is returned as it is.

    A name may be followed by hyper-parameters: ``"nesterov:beta1=0.98:microbatches_per_update=2"``. ``beta1`` and
    ``beta2`` are the entries of ``betas``, and a ``state_dtype`` is written as in ``"nesterov:state_dtype=bfloat16"``.

    Raises:
        ValueError: no recipe has that name, or a hyper-parameter is unknown or cannot have that value.
    """
    if isinstance(method, Recipe):
        return method
    name, *settings = method.split(":")
    if name not in _recipes:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(_recipes)}")
    recipe = _recipes[name]
    return replace(recipe.override(_overrides(recipe, settings)), name=method) if settings else recipe


def _overrides(recipe: Recipe, settings: Sequence[str]) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        try:
            value = literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        if not (key and equals and text):
            raise ValueError(f"after a method's name comes :hyper-parameter=value, not :{setting}")
        if key in ("beta1", "beta2") and "betas" in recipe.options:
            betas = list(overrides.get("betas", recipe.options["betas"]))
            betas[int(key[-1]) - 1] = value
            key, value = "betas", tuple(betas)
        if key == "state_dtype":
            value = getattr(torch, text, value)
        overrides[key] = value
    return overrides
