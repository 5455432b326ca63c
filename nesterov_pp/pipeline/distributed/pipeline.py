"""An asynchronous pipeline across processes: every stage in its own process, never flushed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from nesterov_pp.pipeline.batches import Batches, as_batches
from nesterov_pp.pipeline.checkpoints import stage_part
from nesterov_pp.pipeline.clipping import ClipOver, Norms, check_clip_over, clip, squared_norm
from nesterov_pp.pipeline.delay_models import forwards_ahead, version_for_update
from nesterov_pp.pipeline.distributed.agreement import Report, check_agreement, prints_of
from nesterov_pp.pipeline.distributed.collect import collected
from nesterov_pp.pipeline.distributed.engine import Engine
from nesterov_pp.pipeline.distributed.links import Links
from nesterov_pp.pipeline.distributed.replicas import BUCKET_BYTES, check_shards
from nesterov_pp.pipeline.distributed.store import PipelineError
from nesterov_pp.pipeline.distributed.timeline import Timeline
from nesterov_pp.pipeline.distributed.traffic import Note, Traffic
from nesterov_pp.pipeline.distributed.transport import TorchLinks
from nesterov_pp.pipeline.distributed.versions import Versions
from nesterov_pp.pipeline.distributed.world import World, in_one_sentence
from nesterov_pp.pipeline.export import Entry, Exports, Naming, entries_of, naming_of
from nesterov_pp.pipeline.losses import Loss, LossFunction, loss_of, reweigh, weight_of_update
from nesterov_pp.pipeline.partition import own_stage
from nesterov_pp.pipeline.recipe import Placement, Recipe, find_recipe
from nesterov_pp.pipeline.recompute import Recomputed
from nesterov_pp.pipeline.saving import Checkpoints, Files
from nesterov_pp.pipeline.schedule import drained_before, forward_limit
from nesterov_pp.pipeline.stage import (
    ParamGroups,
    Trained,
    autocasting,
    build_optimizer,
    build_stash,
    random_state,
    rates_of_update,
    run_stage,
    set_horizon,
    set_learning_rate,
)
from nesterov_pp.pipeline.stage_state import StageState, Terms, as_saved_now, check_finished, load_stages, save_stages
from nesterov_pp.pipeline.tensors import device_of, is_finite, to_device
from nesterov_pp.pipeline.wire import Wire, check_wire
from nesterov_pp.stash import OldVersions, gathers_itself

Batch = Callable[[int], tuple[Any, Any]]


class AsyncPipeline(Checkpoints, Exports):
    """One stage of a never-flushing pipeline over the processes of ``world``. Every process creates one.

    The losses and weights are those of ``VirtualPipeline`` with the same arguments. ``step`` completes one microbatch
    on this stage; between its forward and its backward the stage works on up to ``P - i`` others, and with a slack on
    up to ``ceil(slack (P - i) / (P - 1))`` more. Then a stage with stashed weights does not insist on its order of
    events: it runs the backward of a microbatch whose gradients have come while the next activations have not.

    Args:
        stages: this process's stage, a list of all stages, or an ``nn.Sequential`` with ``partition``.
        loss_fn: as for ``VirtualPipeline``.
        batch: ``m -> (inputs, targets)`` for microbatch m = 0, 1, ..., each any nest of tensors; must return the same
            data for the same m. Only the first and the last stage call it. With R replicas, replica r calls it with the
            numbers ``m R + r``. Or a loader of ``(inputs, targets)``, the same in every process, such as a
            ``DataLoader``: ``pipeline.Batches`` takes the microbatches from it in turn.
        microbatches: length of the run; nothing is sent for microbatches after it.
        method, lr, partition, microbatches_per_update, flush_every, max_grad_norm, clip_over, param_groups, backend,
            overrides: as for ``VirtualPipeline``.
        world: the ``World`` that ``connect`` yields.
        seed: makes random layers (dropout) depend on (seed, stage, microbatch) alone.
        replicas: R processes for each stage, whose gradients are averaged. The world has ``P R`` processes, and
            process ``r P + i`` is stage i (from 0) of replica r. A stage that ``fully_shard`` has sharded over its
            replicas needs a method without a stash, and all replicas must call ``evaluate`` and ``predict``.
        bucket_bytes: bytes of gradients that are sent together between replicas.
        receive_ahead: number of messages to receive in each direction before they are needed (default: 1, and with a
            slack twice as many as may be on their way on a link).
        recompute: keep no activations except the stage's input, and run its forward again before its backward.
        autocast: a dtype, such as ``torch.bfloat16``, in which ``torch.autocast`` computes the forwards and the loss.
        wire: "bfloat16" or "int8": what stages send each other in training in fewer bits (default: as it is).
        check_finite: check every activation before it is sent, and the loss, for NaN and Inf (on a GPU this waits for
            the device).
        device: where the stage computes (default: the device of its parameters).
        timeline: record events and their times in ``pipe.timeline``.
        links: ``(world, replicas) -> Links``, the connections between the processes.
        old_versions: how the stage keeps versions of its weights older than the newest, as for ``WeightStash``: "full"
            (default), "8bit-differences" or "bfloat16".

    Attributes:
        stage, replica: this process's stage and replica, counted from 0.
        stages: the number of stages.
        delay: the stage's tau, in updates.
        in_flight: the largest number of microbatches in flight, by which stages can be apart.
        microbatches, updates: numbers completed on this stage.

    Raises:
        ValueError: an argument, or the number of processes, does not fit.
    """

    def __init__(
        self,
        stages: nn.Module | Sequence[nn.Module],
        loss_fn: LossFunction,
        batch: Batch | Iterable[Any],
        microbatches: int,
        world: World,
        method: str | Recipe = "nesterov",
        lr: float = 3e-4,
        *,
        partition: int | str | Sequence[int] | None = None,
        microbatches_per_update: int | None = None,
        flush_every: int | None = None,
        max_grad_norm: float | None = None,
        clip_over: ClipOver = "stage",
        param_groups: ParamGroups | None = None,
        seed: int = 0,
        backend: str = "auto",
        replicas: int = 1,
        bucket_bytes: int = BUCKET_BYTES,
        receive_ahead: int | None = None,
        recompute: bool = False,
        autocast: torch.dtype | None = None,
        wire: Wire | None = None,
        check_finite: bool = True,
        device: torch.device | str | None = None,
        timeline: bool = False,
        links: Callable[[World, int], Links] = TorchLinks,
        old_versions: OldVersions = "full",
        **overrides: Any,
    ) -> None:
        recipe = find_recipe(method).override(overrides)
        if replicas < 1 or world.size % replicas:
            raise ValueError(f"{world.size} processes cannot be divided into {replicas} replicas of a pipeline")
        if receive_ahead is not None and receive_ahead < 0:
            raise ValueError(f"receive_ahead must be at least 0, not {receive_ahead}")
        if flush_every is not None and flush_every < 1:
            raise ValueError(f"flush_every must be at least 1 update, or None for never, not {flush_every}")
        recipe.check_forward(recompute=recompute, autocast=autocast is not None)
        check_wire(wire)
        self.wire = wire
        over_all = check_clip_over(clip_over, max_grad_norm)
        self.recipe, self.loss_fn, self._lr = recipe, loss_fn, lr
        self.stages, self.stage, self.replica = world.size // replicas, 0, 0
        self.stage, self.replica = world.rank % self.stages, world.rank // self.stages
        self.replicas, self.seed, self.flush_every = replicas, seed, flush_every
        self._batch = as_batches(batch, seed, window=(self.stages + 1 + recipe.slack) * replicas)
        self.module = own_stage(stages, partition, self.stages, self.stage, world.agreed, lambda: self._batch(0)[0])
        self._naming = naming_of(stages, self.module, self.stage)
        if device is not None:
            self.module.to(device)
        k = recipe.accumulation(self.stages) if microbatches_per_update is None else microbatches_per_update
        if k < 1:
            raise ValueError(f"microbatches_per_update must be at least 1, not {k}")
        model = recipe.delays_of(self.stages, k)
        self.delays = model.largest
        # A stage further from the end must not have a smaller delay, or the two would wait for each other.
        if not recipe.distributed or model.expected != model.largest or self.delays != sorted(self.delays)[::-1]:
            raise ValueError(f"method {recipe.name!r} runs in a VirtualPipeline only")
        if microbatches < 1 or microbatches % k:
            raise ValueError(f"the length of a run must be a positive multiple of {k} microbatches, not {microbatches}")
        self.microbatches_per_update, self.total = k, microbatches
        aheads = forwards_ahead(self.stages, recipe.slack)
        self.delay, self._ahead, self.in_flight = self.delays[self.stage], aheads[self.stage], aheads[0] + 1
        self.microbatches = self._forwarded = 0
        self.optimizer_seconds = 0.0
        self.timeline = Timeline(self.stage, timeline)
        self._autocast, self._check_finite = autocast, check_finite
        if receive_ahead is None:
            # The word that a receive is posted travels as well, and may queue behind messages the other way.
            receive_ahead = 2 * max(a - b for a, b in pairwise(aheads)) if recipe.slack and self.stages > 1 else 1
        self._receive_ahead = receive_ahead
        self._eager = recipe.slack > 0 and recipe.linearise_at == "version"
        self._losses: dict[int, Loss] = {}
        self._weighs = k > 1 or replicas > 1  # a microbatch's weight matters where an update takes several
        self._weights: list[float | None] = []
        self._max_grad_norm = max_grad_norm if over_all else None
        self._norms = Norms(self.delay + 1) if over_all else None
        self._earlier: dict[int, float] = {}

        check_shards(self.module)
        versions = 1 if recipe.linearise_at == "newest" else self.delay + 1
        self.stash = build_stash(recipe, self.module, versions, old_versions)
        self._place = Placement(self.stage + 1, self.stages, self.delay)
        self._versions = Versions(self.stash, self.delay)
        self.optimizer = build_optimizer(
            recipe,
            self.module,
            self.stash,
            self._place,
            lr=lr,
            max_grad_norm=None if over_all else max_grad_norm,
            backend=backend,
            param_groups=param_groups,
            seed=seed,
        )
        self._trained = Trained()
        self.device = torch.device(device) if device is not None else device_of(self.module)
        self._links = links(world, replicas)
        self._average = None
        if self.optimizer is not None:
            leaves = self.stash.leaves(list(self.stash.parameters(0).values()))
            self._average = self._links.average(leaves, bucket_bytes)
        self._engine = Engine(Recomputed(self.module) if recompute else self.module)
        self._traffic = Traffic(
            self._links,
            self._engine,
            receive_ahead,
            self.in_flight,
            microbatches,
            self.device,
            self._weighs or over_all,
            self.timeline,
            eager=self._eager,
            wire=wire,
        )
        self._world = world
        self._prepared = False
        self._files = Files(
            stage_part(self.stage, self.stages),
            writes=self.replica == 0,
            replicas=replicas,
            behind=self.in_flight,
            gather=world.gather,
            sharded=gathers_itself(self.module),
        )

    @property
    def lr(self) -> float:
        """The base learning rate that was set last. Setting it sets that of the optimizer's groups."""
        return self._lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self._lr = lr
        if self.optimizer is not None:
            set_learning_rate(self.optimizer, lr)

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def updates(self) -> int:
        """The number of updates completed on this stage."""
        return self.microbatches // self.microbatches_per_update

    @property
    def waited(self) -> float:
        """The seconds spent waiting for neighbours so far."""
        return self._traffic.waited

    def step(self) -> Tensor | None:
        """Complete the next microbatch on this stage; every K-th completes an update.

        Any error on one stage reaches the others as the reason why they stop.

        Returns:
            On the last stage, the microbatch's loss (a mean), a detached 0-d tensor (with replicas, the mean over
            them); None on the other stages.

        Raises:
            PipelineError: a loss or an activation is not finite, another stage has stopped or cannot be reached, or, in
                the first step, the processes do not fit together: they have other settings or positions, or two stages
                share a parameter.
            ValueError: the run is over; ``loss_fn`` returned something else than a loss; or the stage's parameters were
                changed in a way that cannot be followed.
        """
        m = self.microbatches
        if m >= self.total:
            raise ValueError(f"the run of {self.total} microbatches is over")
        self._trained.check(self.stash, m % self.microbatches_per_update)
        if not self._prepared:
            self._prepare()
        limit = forward_limit(
            m,
            ahead=self._ahead,
            delay=self._delay_of(self.updates),
            microbatches_per_update=self.microbatches_per_update,
            flush_every=self.flush_every,
            stop=self.total,
        )
        while self._next_is_forward(m, limit):
            self._forward(self._forwarded)
            self._forwarded += 1
        loss = self._backward(m)
        self.microbatches += 1
        if self.microbatches % self.microbatches_per_update == 0:
            self._update(self.updates - 1)
        if self.microbatches == self.total:
            self._traffic.finish()
        return loss

    def _next_is_forward(self, m: int, limit: int) -> bool:
        """Return whether a forward comes next, of those up to ``limit``, or else the backward of ``m``."""
        if self._forwarded > limit:
            return False
        if not self._eager or self._forwarded == m:
            return True
        return self._traffic.has_inputs_first(self._forwarded, m)

    # ------------------------------------------------------------------ evaluation: called on all stages of a pipeline

    def evaluate(self, inputs: Any, targets: Any) -> Tensor | None:
        """Return the loss at every stage's newest weights, in evaluation mode; None on stages before the last.

        All stages of a pipeline must call this after the same number of microbatches. Nothing is flushed for it.
        """
        with self._evaluating():
            output = self._through(inputs)
            if not self.is_last:
                return None
            return loss_of(self.loss_fn(output, to_device(targets, self.device))).mean.detach()

    def predict(self, inputs: Any) -> Any:
        """Return the last stage's output at every stage's newest weights, in evaluation mode, on all stages."""
        with self._evaluating():
            return self._links.side.broadcast(self._through(inputs), self.stages - 1, self.device)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        mode = self.module.training
        try:
            with torch.no_grad(), self.timeline.span("evaluate", self.microbatches), self._autocasting():
                self.module.eval()
                with self.stash.use_stepped():
                    yield
        finally:
            self.module.train(mode)

    def _through(self, inputs: Any) -> Any:
        side = self._links.side
        hidden = to_device(inputs, self.device) if self.is_first else side.receive(self.device)
        output = run_stage(self.module, hidden)
        if not self.is_last:
            side.send_on(output)
        return output

    # ------------------------------------------------------------------ checkpoints

    def memory(self) -> dict[str, int]:
        """Return the bytes this stage holds, as ``VirtualPipeline.memory`` does for all stages."""
        return self._state().memory()

    def keep_for(self, update: int) -> None:
        """Announce that ``state_dict`` will be called after ``update`` updates.

        A recipe without a stash overwrites the weights that microbatches in flight began with, and a stash with
        ``old_versions`` other than "full" no longer has them exactly; from this call on, those that the state needs are
        copied as they come, and held until their microbatches are done. With a full stash there is nothing to do.
        ``save`` with ``every=`` and ``resume`` call this themselves.
        """
        self._versions.keep_for(update)

    def state_dict(self) -> dict[str, Any]:
        """Return what this stage needs to continue: the versions of microbatches in flight, optimizer and position.

        Raises:
            ValueError: microbatches of an unfinished update are waiting, or ``keep_for`` was not called in time.
        """
        check_finished(self.microbatches % self.microbatches_per_update, self.microbatches_per_update)
        own = {**self._state().save(), "kept": self._versions.needed(self.versions_in_flight())}
        return save_stages(self._terms(), self.microbatches, self.updates, {self.stage: own})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned, before the first ``step``.

        Microbatches that were in flight run again.

        Raises:
            ValueError: the state belongs to another stage, method, K or seed, or to other delays, or the run has begun;
                nothing is changed.
        """
        if self._prepared:
            raise ValueError("load_state_dict must be called before the first step")
        whole = as_saved_now(state)
        self._terms().check(whole["terms"])
        self._check_in_flight(whole)
        saved = load_stages(self._terms(), {self.stage: self._state()}, state)
        own = saved["stages"][self.stage]
        self._versions.load(own.get("kept", {}), own["stash"])
        self.microbatches = self._forwarded = int(saved["microbatches"])

    def _check_in_flight(self, saved: dict[str, Any]) -> None:
        """Check that a saved state has the weights that this run's microbatches in flight began with.

        Without a stash, those after the end of a run are not kept.
        """
        if self.stash.versions > self.delay or self.stage not in saved["stages"]:
            return
        updates, kept = int(saved["updates"]), saved["stages"][self.stage].get("kept", {})
        missing = [v for v in self._in_flight_after(updates) if v < updates and v not in kept]
        if missing:
            raise ValueError(
                f"it was saved at the end of a run of {saved['microbatches']} microbatches, and without a stash it "
                f"cannot go on to {self.total}; start a run of that length anew from its weights"
            )

    def _is_due(self, every: int) -> bool:
        over = self.microbatches == self.total
        if self.microbatches % self.microbatches_per_update or not (over or self.updates % every == 0):
            return False
        return self.updates > 0 and not self._versions.missing(self.versions_in_flight())

    def _own_data(self) -> Batches | None:
        return self._batch if isinstance(self._batch, Batches) and (self.is_first or self.is_last) else None

    def _entries(self, names: Naming | None) -> Iterator[Entry] | None:
        rename = self._naming if names is None else partial(names, self.stage)
        return collected(self._world, self.stages, entries_of(self.module, rename))

    def _terms(self) -> Terms:
        k = self.microbatches_per_update
        return Terms(self.recipe.name, k, list(self.delays), self.flush_every, self.seed, self.replicas, self.wire)

    def _state(self) -> StageState:
        return StageState(self.stash, self.optimizer, self.module, norms=self._norms)

    # ------------------------------------------------------------------ events

    def _prepare(self) -> None:
        """Check that the processes fit together, and start at the position."""
        settings = {
            **asdict(self._terms()),
            "microbatches": self.total,
            "slack": self.recipe.slack,
            "receive_ahead": self._receive_ahead,
            "clip_over": "stage" if self._norms is None else "pipeline",
            "old_versions": self.stash.old_versions,
            "position": self.microbatches,
        }
        own = Report(self._world.rank, self.stage, settings, [] if self.replica else prints_of(self.module))
        check_agreement(self._world.gather(own))
        self._traffic.begin(self.microbatches)
        self._prepared = True

    def _asked(self, m: int) -> tuple[Any, Any]:
        inputs, targets = self._batch(m * self.replicas + self.replica)
        return to_device(inputs, self.device), to_device(targets, self.device)

    def _version(self, m: int) -> int:
        update = m // self.microbatches_per_update
        drained_at = drained_before(update, self.flush_every, self.recipe.synchronous_updates or 0)
        version = version_for_update(update, self.delay, drained_at)
        return version if self.optimizer is not None else 0

    def _delay_of(self, update: int) -> int:
        return self.delay if update >= (self.recipe.synchronous_updates or 0) else 0

    def versions_in_flight(self) -> set[int]:
        """Return the versions of microbatches in flight after an update, or that may start before the next update."""
        return self._in_flight_after(self.updates)

    def _in_flight_after(self, done: int) -> set[int]:
        k = self.microbatches_per_update
        updates = range(done, done + self.delay + 1)
        return {self._version(update * k) for update in updates if update * k < self.total}

    @contextmanager
    def _told(self, what: str, m: int) -> Iterator[None]:
        """Tell the other processes of an error inside the block."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, PipelineError):
                self._world.tell(
                    f"{in_one_sentence(error)} (in the {what} of microbatch {m + 1} on stage {self.stage})"
                )
            raise

    def _forward(self, m: int) -> None:
        inputs, earlier = self._traffic.inputs(m)
        with self.timeline.span("forward", m), self._told("forward", m):
            given, targets = self._asked(m) if self.is_first or self.is_last else (None, None)
            with ExitStack() as bound:
                bound.enter_context(self._versions.use(self._version(m), self.recipe.linearise_at))
                bound.enter_context(self._autocasting())
                with random_state(self.module, self.seed, self.stage, m * self.replicas + self.replica):
                    output = self._engine.forward(m, given if self.is_first else inputs)
                if self.is_last:
                    self._losses[m] = loss_of(self.loss_fn(output, targets))
            if self._check_finite and not is_finite(self._losses[m].tensor if self.is_last else output):
                what = "an activation is not finite"
                if self.is_last:
                    what = f"the loss is {float(self._losses[m].mean)}"
                raise PipelineError(f"{what} at microbatch {m + 1}, on stage {self.stage}")
            if self._norms is not None:
                self._earlier[m] = earlier
                earlier += self._norms.of(self._version(m))
            self._traffic.hand_on(m, output, earlier)

    def _backward(self, m: int) -> Tensor | None:
        note, gradients = self._traffic.gradients(m, self._forwarded)
        loss = self._losses.pop(m, None)
        if loss is not None:
            note = Note(loss.weight)
        completes = (m + 1) % self.microbatches_per_update == 0
        with self.timeline.span("backward", m), self._told("backward", m):
            if self._average is not None and completes:
                self._average.expect(self.stash.slot_of(max(self._version(m), self.stash.oldest)))
            objective = None if loss is None else (loss.tensor if self._weighs else loss.mean)
            with self._versions.during_backward(self._version(m), self.recipe.linearise_at):
                back = self._engine.backward(m, objective, gradients)
            if self._weighs:
                self._weights.append(note.weight)
                weight_of_update(self._weights)
        if completes and self._norms is not None:
            note = note._replace(square=self._clip(m, note.square))
        self._traffic.hand_back(m, note, back)
        if completes and self._norms is None:
            self._complete(m)
        return None if loss is None else self._mean(loss)

    def _complete(self, m: int) -> list[Tensor]:
        """Return the parameters with the gradients of the update that microbatch ``m`` completes, ready for a step."""
        if self._average is not None:
            with self.timeline.span("average", m):
                self._average.finish()
        weight, self._weights = weight_of_update(self._weights), []
        if weight is not None and self.replicas > 1:
            weight = float(self._links.mean(torch.tensor(weight, dtype=torch.float64)))
        parameters = self._versions.with_gradients(self._version(m))
        reweigh(parameters, self.microbatches_per_update, weight)
        return parameters

    def _clip(self, m: int, later: float) -> float:
        """Clip by the norm of all stages; return the squared norm of this stage and those after it."""
        assert self._norms is not None
        assert self._max_grad_norm is not None
        parameters = self._complete(m)
        own = squared_norm(parameters, self.microbatches_per_update)
        self._norms.note(self.stash.newest + 1, own)
        earlier = self._earlier.pop(m)
        self._earlier = {k: norm for k, norm in self._earlier.items() if k > m}
        clip(parameters, earlier + (later + own), self._max_grad_norm)
        return later + own

    def _mean(self, loss: Loss) -> Tensor:
        """Return a microbatch's mean loss over the replicas."""
        if loss.weight is None or self.replicas == 1:
            return self._links.mean(loss.mean.detach())
        both = torch.tensor([float(loss.tensor), loss.weight], dtype=torch.float64)
        total, weight = self._links.mean(both).tolist()
        return loss.tensor.new_tensor(total / weight if weight else total)

    def _update(self, update: int) -> None:
        begin = time.perf_counter()
        with self.timeline.span("step", update):
            if self.optimizer is not None:
                set_horizon(self.optimizer, self.recipe, self._place, update)
                version = self._version(update * self.microbatches_per_update)
                with rates_of_update(self.optimizer, self.recipe, self._delay_of(update), update):
                    self._versions.step(self.optimizer, version, self.microbatches_per_update)
        self.optimizer_seconds += time.perf_counter() - begin

    def _autocasting(self) -> AbstractContextManager[Any]:
        return autocasting(self.module, self._autocast)
