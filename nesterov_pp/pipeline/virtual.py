"""An asynchronous pipeline of any number of stages, emulated exactly in one process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from nesterov_pp.pipeline.batches import Batches
from nesterov_pp.pipeline.clipping import ClipOver, Norms, check_clip_over, clip, squared_norm
from nesterov_pp.pipeline.delay_models import Delays, Fixed, version_for_update
from nesterov_pp.pipeline.export import Entry, Exports, Naming, entries_of, naming_of
from nesterov_pp.pipeline.losses import LossFunction, loss_of, reweigh, weight_of_update
from nesterov_pp.pipeline.partition import stage_list
from nesterov_pp.pipeline.recipe import Forecast, Placement, Recipe, StageOptimizer, find_recipe
from nesterov_pp.pipeline.recompute import Recomputed
from nesterov_pp.pipeline.saving import Checkpoints, Files
from nesterov_pp.pipeline.schedule import drained_before
from nesterov_pp.pipeline.stage import (
    ParamGroups,
    Trained,
    autocasting,
    build_optimizer,
    build_stash,
    named_stage,
    random_state,
    rates_of_update,
    run_stage,
    set_horizon,
    set_learning_rate,
)
from nesterov_pp.pipeline.stage_state import StageState, Terms, check_finished, load_stages, memory_of, save_stages
from nesterov_pp.pipeline.wire import Wire, across, check_wire
from nesterov_pp.stash import OldVersions


class VirtualPipeline(Checkpoints, Exports):
    """A never-flushing pipeline of ``stages``, emulated in one process. Each call trains on one microbatch.

    Update ``t`` applies the gradient of its microbatches at version ``max(0, t - tau_i)`` of stage ``i``'s weights,
    where ``tau_i = floor((2 (P - i) + 1) / (2 K))``, and turns version ``t`` into version ``t + 1``. With
    ``slack=n``, ``P - i + ceil(n (P - i) / (P - 1))`` takes the place of ``P - i``. The losses and weights are those of
    the pipeline with P processes; with one stage, those of ordinary training. Some methods have other delays, and
    ``delays`` sets any.

    Args:
        stages: the stage modules in order, each mapping the output of the previous one to its own; or an
            ``nn.Sequential`` with ``partition``. Inputs and outputs are any nest of tensors and plain values: a tuple
            is passed on as arguments, a dict as keyword arguments. Shapes may differ from microbatch to microbatch.
        loss_fn: ``(output of the last stage, targets) -> 0-d tensor``, a mean over the microbatch; or ``-> (sum,
            weight)``, such as the sum over valid tokens and their number: an update then takes the mean over all valid
            tokens of its microbatches.
        method: a name from ``recipes()``, or a ``Recipe``.
        lr: base learning rate; may be changed at any time as ``pipe.lr``, or by schedulers on ``pipe.optimizers``. A
            recipe's factor multiplies it during a step.
        partition: for an ``nn.Sequential``: the number of layers of each stage, or the number of stages.
        microbatches_per_update: K (default: the recipe's).
        delays: the delays of every microbatch on every stage, instead of the method's own: one number per stage, or a
            delay model (``pipeline.Uniform``, ``Geometric``, ``Trace``, ``Stragglers``, ``DropOuts``, ...). A recipe
            with ``constant_delay`` is given the expected delay. A microbatch that is lost has no gradient.
        flush_every: drain the pipeline after every ``flush_every`` updates and continue with all versions equal, as
            the paper's released code does every 1,000 updates (default: never).
        max_grad_norm: clip the gradient norm to this value (default: no clipping).
        clip_over: whose norm that is: of each "stage" (default), or of the whole "pipeline", of which a stage knows the
            norms of later stages in time and those of earlier stages ``tau + 1`` updates late.
        param_groups: ``(stage module) -> groups`` for its optimizer, which hold every trainable parameter once. A
            group's ``"lr_scale"`` multiplies ``lr``; its other entries are options of the rule's groups, such as
            ``"weight_decay"`` (default: one group). ``no_decay`` is such a function.
        seed: makes random layers (dropout) depend on (seed, stage, microbatch) alone (default: the global generator).
        backend: as for the optimizers.
        recompute: keep no activations inside a stage, and run its forward again before its backward.
        autocast: a dtype, such as ``torch.bfloat16``, in which ``torch.autocast`` computes the forwards and the loss.
        wire: "bfloat16" or "int8": what stages send each other in training, activations and their gradients, in fewer
            bits (default: as it is).
        old_versions: how a stage keeps versions of its weights older than the newest, as for ``WeightStash``: "full"
            (default), "8bit-differences" or "bfloat16".
        overrides: hyper-parameters of the recipe to replace, such as ``slack`` (further microbatches in flight), and
            ``state_dtype``, ``master_weights`` and ``stochastic_rounding`` (as for ``optim.NAdam``, with the seed of
            the pipeline), if its rule has them.

    The emulation keeps one version more of each stage's weights than its largest delay, even for recipes that need no
    stash in a real pipeline, and keeps all of them in full, whatever ``old_versions`` is, since its forwards run late.
    ``pipe.delays`` holds the expected delays. Modules stay in the mode (training or evaluation) that they are in.
    Between two updates, parameters can be frozen and unfrozen by ``requires_grad_``, if they required gradients when
    the pipeline was built.

    Raises:
        ValueError: the method or a hyper-parameter is unknown, the partition is invalid, parameters are tied across
            stages, ``delays`` does not have one entry per stage, the method cannot have these delays, or the recipe
            needs the activations or weights that ``recompute`` or ``autocast`` would replace.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module] | nn.Sequential,
        loss_fn: LossFunction,
        method: str | Recipe = "nesterov",
        lr: float = 3e-4,
        *,
        partition: int | Sequence[int] | None = None,
        microbatches_per_update: int | None = None,
        delays: Delays | Sequence[int] | None = None,
        flush_every: int | None = None,
        max_grad_norm: float | None = None,
        clip_over: ClipOver = "stage",
        param_groups: ParamGroups | None = None,
        seed: int | None = None,
        backend: str = "auto",
        recompute: bool = False,
        autocast: torch.dtype | None = None,
        wire: Wire | None = None,
        old_versions: OldVersions = "full",
        **overrides: Any,
    ) -> None:
        recipe = find_recipe(method).override(overrides)
        recipe.check_forward(recompute=recompute, autocast=autocast is not None)
        check_wire(wire)
        self.wire = wire
        over_all = check_clip_over(clip_over, max_grad_norm)
        self.stages = stage_list(stages, partition)
        self._naming = [naming_of(stages, stage, i) for i, stage in enumerate(self.stages)]
        self._files = Files()
        if flush_every is not None and flush_every < 1:
            raise ValueError(f"flush_every must be at least 1 update, or None for never, not {flush_every}")
        k = recipe.accumulation(len(self.stages)) if microbatches_per_update is None else microbatches_per_update
        if k < 1:
            raise ValueError(f"stages and microbatches_per_update must be at least 1, not {len(self.stages)} and {k}")
        self.recipe = recipe
        self.loss_fn = loss_fn
        self._lr = lr
        self.microbatches_per_update = k
        self.flush_every = flush_every
        self.seed = seed
        self.delay_model = _delay_model(recipe, len(self.stages), k, delays)
        self.delays = self.delay_model.expected
        self.microbatches = 0
        self.updates = 0
        self.optimizer_seconds = 0.0
        self.stashes = [
            build_stash(recipe, m, n + 1, old_versions, exact_forward=True)
            for m, n in zip(self.stages, self.delay_model.largest, strict=True)
        ]
        self._forwards = [Recomputed(module) if recompute else module for module in self.stages]
        self._autocast = autocast
        self.places = [Placement(i, len(self.stages), tau) for i, tau in enumerate(self.delays, start=1)]
        self.optimizers: list[StageOptimizer | None] = [
            build_optimizer(
                recipe,
                module,
                stash,
                place,
                lr=lr,
                max_grad_norm=None if over_all else max_grad_norm,
                backend=backend,
                param_groups=param_groups,
                seed=seed,
            )
            for module, stash, place in zip(self.stages, self.stashes, self.places, strict=True)
        ]
        self.forecasts: list[Forecast] = [] if recipe.forecast is None else [recipe.forecast() for _ in self.stages]
        self._trained = [Trained() for _ in self.stages]
        # For each stage: the version and the delay that each microbatch since the last update ran with.
        self._ran_with: list[list[tuple[int, int]]] = [[] for _ in self.stages]
        self._weights: list[float | None] = []
        self._max_grad_norm = max_grad_norm if over_all else None
        self._norms = [Norms(stash.versions) for stash in self.stashes] if over_all else []

    @property
    def lr(self) -> float:
        """The base learning rate that was set last. Setting it sets that of every optimizer's groups."""
        return self._lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self._lr = lr
        for optimizer in self.optimizers:
            if optimizer is not None:
                set_learning_rate(optimizer, lr)

    @property
    def waiting(self) -> int:
        """The number of microbatches taken for an unfinished update."""
        return len(self._ran_with[0])

    def versions(self) -> list[int]:
        """Return the weight version of the next microbatch on each stage (the newest, if it will be lost)."""
        return self._versions(self._draw() or [0] * len(self.stages))

    def step(self, inputs: Any, targets: Any) -> Tensor:
        """Run one microbatch through the delayed stages; every K-th that is not lost completes an update.

        Returns:
            The microbatch's loss (a mean), a detached 0-d tensor; for a lost microbatch, that at the newest weights.

        Raises:
            ValueError: ``loss_fn`` returned something else, or weights for some microbatches of an update only; or the
                parameters of a stage were changed in a way that cannot be followed.
        """
        for i, (trained, stash) in enumerate(zip(self._trained, self.stashes, strict=True)):
            with named_stage(i):
                trained.check(stash, self.waiting)
        delays = self._draw()
        versions = self._versions(delays or [0] * len(self.stages))
        with ExitStack() as bound:
            if delays is None:
                bound.enter_context(torch.no_grad())
            hidden = inputs
            with autocasting(self.stages[0], self._autocast):
                for i, (module, stash) in enumerate(zip(self.stages, self.stashes, strict=True)):
                    with named_stage(i):
                        bound.enter_context(stash.use(versions[i], linearise_at=self.recipe.linearise_at))
                    with random_state(module, self.seed, i, self.microbatches):
                        hidden = run_stage(self._forwards[i], across(hidden, self.wire) if i else hidden)
                loss = loss_of(self.loss_fn(hidden, targets))
            if delays is not None:
                alone = self.microbatches_per_update == 1
                weights = [] if alone else [*self._weights, loss.weight]
                weight_of_update(weights)
                self._backward(loss.mean if alone else loss.tensor, versions, delays)
                self._weights = weights
        self.microbatches += 1
        if delays is None:
            return loss.mean.detach()
        for i, ran_with in enumerate(self._ran_with):
            ran_with.append((versions[i], delays[i]))
        if self.waiting == self.microbatches_per_update:
            self._update()
        return loss.mean.detach()

    def predict(self, inputs: Any) -> Any:
        """Return the last stage's output at every stage's newest weights, in evaluation mode, without gradients.

        If forwards run at predicted weights, the output is at the weights from which these are predicted.
        """
        modes = [module.training for module in self.stages]
        try:
            with torch.no_grad(), autocasting(self.stages[0], self._autocast):
                hidden = inputs
                for module, stash in zip(self.stages, self.stashes, strict=True):
                    with stash.use_stepped():
                        hidden = run_stage(module.eval(), hidden)
                return hidden
        finally:
            for module, training in zip(self.stages, modes, strict=True):
                module.train(training)

    def evaluate(self, inputs: Any, targets: Any) -> Tensor:
        """Return the loss at every stage's newest weights, in evaluation mode, without gradients; a 0-d tensor."""
        output = self.predict(inputs)
        with torch.no_grad(), autocasting(self.stages[0], self._autocast):
            return loss_of(self.loss_fn(output, targets)).mean

    def memory(self) -> dict[str, int]:
        """Return the bytes held by all stages: ``weights`` (one version), ``stash`` (the others), ``moments``,
        ``masters``.

        ``stash`` includes the shadows, ``moments`` all tensors of the optimizers' state but the master weights.
        """
        return memory_of(self._stage_states().values())

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next ``step`` depends on, except the global random state.

        Call this between updates only.

        Raises:
            ValueError: microbatches of an unfinished update are waiting.
        """
        check_finished(self.waiting, self.microbatches_per_update)
        stages = {i: stage.save() for i, stage in self._stage_states().items()}
        return save_stages(self._terms(), self.microbatches, self.updates, stages)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned.

        Raises:
            ValueError: the state belongs to another method, model, K or seed, or to other delays; nothing is changed.
        """
        saved = load_stages(self._terms(), self._stage_states(), state)
        self._ran_with, self._weights = [[] for _ in self.stages], []
        self.microbatches, self.updates = int(saved["microbatches"]), int(saved["updates"])

    def keep_for(self, update: int) -> None:
        """Announce that ``state_dict`` will be called after ``update`` updates; here, there is nothing to do."""

    def _is_due(self, every: int) -> bool:
        return not self.waiting and self.updates > 0 and self.updates % every == 0

    def _own_data(self) -> Batches | None:
        return None

    def _entries(self, names: Naming | None) -> Iterator[Entry]:
        for i, stage in enumerate(self.stages):
            yield from entries_of(stage, self._naming[i] if names is None else partial(names, i))

    def _terms(self) -> Terms:
        k, delays = self.microbatches_per_update, list(self.delays)
        return Terms(self.recipe.name, k, delays, self.flush_every, self.seed, wire=self.wire)

    def _stage_states(self) -> dict[int, StageState]:
        forecasts: Sequence[Forecast | None] = self.forecasts or [None] * len(self.stages)
        norms: Sequence[Norms | None] = self._norms or [None] * len(self.stages)
        parts = zip(self.stashes, self.optimizers, self.stages, forecasts, norms, strict=True)
        return {i: StageState(*part) for i, part in enumerate(parts)}

    def _draw(self) -> list[int] | None:
        """Return the next microbatch's delays; None if it will be lost."""
        if self.updates < (self.recipe.synchronous_updates or 0):
            return [0] * len(self.stages)
        return self.delay_model.draw(self.microbatches)

    def _versions(self, delays: list[int]) -> list[int]:
        drained_at = drained_before(self.updates, self.flush_every, self.recipe.synchronous_updates or 0)
        wanted = [version_for_update(self.updates, tau, drained_at) for tau in delays]
        # A stage without trainable parameters has no optimizer and stays at version 0.
        return [min(version, stash.newest) for version, stash in zip(wanted, self.stashes, strict=True)]

    def _backward(self, loss: Tensor, versions: list[int], delays: list[int]) -> None:
        """Add the microbatch's gradients to those of its update; where it is too late for a stage, they are zeros."""
        limit = self.recipe.max_staleness
        kept = []
        for stash, version, delay in zip(self.stashes, versions, delays, strict=True):
            if limit is not None and delay > limit:
                kept += [(p, p.grad) for p in stash.parameters(version).values()]
        for p, _ in kept:
            p.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        for p, grad in kept:
            p.grad = torch.zeros_like(p) if grad is None else grad

    def _update(self) -> None:
        start = time.perf_counter()
        weight, self._weights = weight_of_update(self._weights), []
        parts: list[tuple[int, int, list[Tensor]] | None] = []
        last = [ran_with[-1][0] for ran_with in self._ran_with]
        for i, (optimizer, stash) in enumerate(zip(self.optimizers, self.stashes, strict=True)):
            ran_with, self._ran_with[i] = self._ran_with[i], []
            if optimizer is None:
                parts.append(None)
                continue
            version = stash.gather_gradients([version for version, _ in ran_with])
            parameters: list[Tensor] = list(stash.parameters(version).values())
            reweigh(parameters, self.microbatches_per_update, weight)
            parts.append((version, max(delay for _, delay in ran_with), parameters))
        self._clip([[] if part is None else part[2] for part in parts], last)
        for i, (optimizer, part) in enumerate(zip(self.optimizers, parts, strict=True)):
            if optimizer is None or part is None:
                continue
            version, delay, parameters = part
            if self.forecasts:
                self.forecasts[i].apply(parameters, delay)
            set_horizon(optimizer, self.recipe, self.places[i], self.updates)
            with rates_of_update(optimizer, self.recipe, delay, self.updates):
                optimizer.step(version=version, microbatches=self.microbatches_per_update)
        self.updates += 1
        self.optimizer_seconds += time.perf_counter() - start

    def _clip(self, parameters: Sequence[list[Tensor]], versions: Sequence[int]) -> None:
        """Clip by the norm of all stages, whose last microbatch ran with these versions, if that was asked for."""
        if self._max_grad_norm is None:
            return
        earlier = list(accumulate((n.of(v) for n, v in zip(self._norms, versions, strict=True)), initial=0.0))
        from_here_on = 0.0
        for i in reversed(range(len(self.stages))):
            own = squared_norm(parameters[i], self.microbatches_per_update)
            from_here_on += own
            clip(parameters[i], earlier[i] + from_here_on, self._max_grad_norm)
            self._norms[i].note(self.stashes[i].newest + 1, own)


def _delay_model(recipe: Recipe, stages: int, k: int, delays: Delays | Sequence[int] | None) -> Delays:
    if delays is None:
        return recipe.delays_of(stages, k)
    if not recipe.delayed:
        raise ValueError(f"method {recipe.name!r} waits for its gradients, so it takes no delays")
    if recipe.slack:
        raise ValueError("slack adds to the method's own delays; omit it, or omit delays")
    model = Fixed(list(delays)) if isinstance(delays, Sequence) else delays
    if len(model.largest) != stages:
        raise ValueError(f"delays need one entry for each of {stages} stages, not {len(model.largest)}")
    return model
