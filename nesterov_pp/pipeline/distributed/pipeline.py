"""An asynchronous pipeline across processes: every stage in its own process, never flushed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nesterov_pp.pipeline.batches import Batches, as_batches
from nesterov_pp.pipeline.checkpoints import stage_part
from nesterov_pp.pipeline.delay_models import version_for_update
from nesterov_pp.pipeline.distributed.collect import collected
from nesterov_pp.pipeline.distributed.links import Channel, Links
from nesterov_pp.pipeline.distributed.replicas import BUCKET_BYTES, check_shards
from nesterov_pp.pipeline.distributed.timeline import Timeline
from nesterov_pp.pipeline.distributed.transport import TorchLinks
from nesterov_pp.pipeline.distributed.versions import Versions
from nesterov_pp.pipeline.distributed.world import PipelineError, World
from nesterov_pp.pipeline.export import Entry, Exports, Naming, entries_of, naming_of
from nesterov_pp.pipeline.partition import own_stage
from nesterov_pp.pipeline.recipe import Placement, Recipe, find_recipe
from nesterov_pp.pipeline.recompute import Recomputed
from nesterov_pp.pipeline.saving import Checkpoints, Files
from nesterov_pp.pipeline.schedule import drained_before, forward_limit
from nesterov_pp.pipeline.stage import (
    ParamGroups,
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
from nesterov_pp.stash import gathers_itself

LossFunction = Callable[[Any, Any], Tensor]
Batch = Callable[[int], tuple[Any, Tensor]]


class AsyncPipeline(Checkpoints, Exports):
    """One stage of a never-flushing pipeline over the processes of ``world``. Every process creates one.

    The losses and weights are those of ``VirtualPipeline`` with the same arguments. ``step`` completes one microbatch
    on this stage; between its forward and its backward the stage works on up to ``P - i`` others.

    Args:
        stages: this process's stage, a list of all stages, or an ``nn.Sequential`` with ``partition``.
        loss_fn: ``(output of the last stage, targets) -> 0-d tensor``, a mean over the microbatch.
        batch: ``m -> (inputs, targets)`` for microbatch m = 0, 1, ...; must return the same data for the same m, and
            tensors of the same shapes and dtypes for every m. Only the first and the last stage call it. With R
            replicas, replica r calls it with the numbers ``m R + r``. Or a loader of ``(inputs, targets)``, the same in
            every process, such as a ``DataLoader``: ``pipeline.Batches`` takes the microbatches from it in turn.
        microbatches: length of the run; nothing is sent for microbatches after it.
        method, lr, partition, microbatches_per_update, flush_every, max_grad_norm, param_groups, backend, overrides: as
            for ``VirtualPipeline``.
        world: the ``World`` that ``connect`` yields.
        seed: makes random layers (dropout) depend on (seed, stage, microbatch) alone.
        replicas: R processes for each stage, whose gradients are averaged. The world has ``P R`` processes, and
            process ``r P + i`` is stage i (from 0) of replica r. A stage that ``fully_shard`` has sharded over its
            replicas needs a method without a stash, and all replicas must call ``evaluate`` and ``predict``.
        bucket_bytes: bytes of gradients that are sent together between replicas.
        receive_ahead: number of messages to receive in each direction before they are needed.
        recompute: keep no activations except the stage's input, and run its forward again before its backward.
        autocast: a dtype, such as ``torch.bfloat16``, in which ``torch.autocast`` computes the forwards and the loss.
        check_finite: check every activation before it is sent, and the loss, for NaN and Inf (on a GPU this waits for
            the device).
        device: where the stage computes (default: the device of its parameters).
        timeline: record events and their times in ``pipe.timeline``.
        links: ``(world, replicas) -> Links``, the connections between the processes.

    Attributes:
        stage, replica: this process's stage and replica, counted from 0.
        stages: the number of stages.
        delay: the stage's tau, in updates.
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
        param_groups: ParamGroups | None = None,
        seed: int = 0,
        backend: str = "auto",
        replicas: int = 1,
        bucket_bytes: int = BUCKET_BYTES,
        receive_ahead: int = 1,
        recompute: bool = False,
        autocast: torch.dtype | None = None,
        check_finite: bool = True,
        device: torch.device | str | None = None,
        timeline: bool = False,
        links: Callable[[World, int], Links] = TorchLinks,
        **overrides: Any,
    ) -> None:
        from nesterov_pp.pipeline.distributed.torch_engine import TorchStage

        recipe = find_recipe(method).override(overrides)
        if replicas < 1 or world.size % replicas:
            raise ValueError(f"{world.size} processes cannot be divided into {replicas} replicas of a pipeline")
        if receive_ahead < 0:
            raise ValueError(f"receive_ahead must be at least 0, not {receive_ahead}")
        if flush_every is not None and flush_every < 1:
            raise ValueError(f"flush_every must be at least 1 update, or None for never, not {flush_every}")
        recipe.check_forward(recompute=recompute, autocast=autocast is not None)
        self.recipe, self.loss_fn, self._lr = recipe, loss_fn, lr
        self.stages, self.stage, self.replica = world.size // replicas, 0, 0
        self.stage, self.replica = world.rank % self.stages, world.rank // self.stages
        self.replicas, self.seed, self.flush_every = replicas, seed, flush_every
        self._batch = as_batches(batch, seed, window=(self.stages + 1) * replicas)
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
        self.delay, self._ahead = self.delays[self.stage], self.stages - 1 - self.stage
        self.microbatches = self._forwarded = 0
        self.optimizer_seconds = 0.0
        self.timeline = Timeline(self.stage, timeline)
        self._autocast, self._check_finite = autocast, check_finite
        self._receive_ahead = receive_ahead
        self._losses: dict[int, Tensor] = {}

        check_shards(self.module)
        self.stash = build_stash(recipe, self.module, 1 if recipe.linearise_at == "newest" else self.delay + 1)
        self._place = Placement(self.stage + 1, self.stages, self.delay)
        self._versions = Versions(self.stash, self.delay)
        self.optimizer = build_optimizer(
            recipe,
            self.module,
            self.stash,
            self._place,
            lr=lr,
            max_grad_norm=max_grad_norm,
            backend=backend,
            param_groups=param_groups,
        )
        self.device = torch.device(device) if device is not None else device_of(self.module)
        self._links = links(world, replicas)
        self._average = None
        if self.optimizer is not None:
            leaves = self.stash.leaves(list(self.stash.parameters(0).values()))
            self._average = self._links.average(leaves, bucket_bytes)
        self._engine = TorchStage(
            Recomputed(self.module) if recompute else self.module,
            self.stage,
            self.stages,
            self.device,
            self._ahead + 1 + receive_ahead,
            loss_fn,
            self._links.pipeline,
        )
        self._prepared = False
        self._world = world
        self._files = Files(
            stage_part(self.stage, self.stages),
            writes=self.replica == 0,
            replicas=replicas,
            behind=self.stages,
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
        return sum(channel.waited for channel in self._links.channels())

    def step(self) -> Tensor | None:
        """Complete the next microbatch on this stage; every K-th completes an update.

        Returns:
            On the last stage, the microbatch's loss, a detached 0-d tensor (with replicas, the mean over them); None on
            the other stages.

        Raises:
            PipelineError: a loss or an activation is not finite, or another stage has stopped or cannot be reached.
            ValueError: the run is over.
        """
        m = self.microbatches
        if m >= self.total:
            raise ValueError(f"the run of {self.total} microbatches is over")
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
        while self._forwarded <= limit:
            self._forward(self._forwarded)
            self._forwarded += 1
        loss = self._backward(m)
        self.microbatches += 1
        if self.microbatches % self.microbatches_per_update == 0:
            self._update(self.updates - 1)
        if self.microbatches == self.total:
            for channel in self._links.channels():
                channel.finish()
        return loss

    # ------------------------------------------------------------------ evaluation: called on all stages of a pipeline

    def evaluate(self, inputs: Any, targets: Tensor) -> Tensor | None:
        """Return the loss at every stage's newest weights, in evaluation mode; None on stages before the last.

        All stages of a pipeline must call this after the same number of microbatches. Nothing is flushed for it.
        """
        with self._evaluating():
            output = self._through(inputs)
            return self.loss_fn(output, targets.to(self.device)).detach() if self.is_last else None

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
        """Return the bytes this stage holds: ``weights`` (one version), ``stash`` (the others), ``moments``."""
        return self._state().memory()

    def keep_for(self, update: int) -> None:
        """Announce that ``state_dict`` will be called after ``update`` updates.

        A recipe without a stash overwrites the weights that microbatches in flight began with; from this call on, those
        that the state needs are copied as they come. With a stash there is nothing to do. ``save`` with ``every=`` and
        ``resume`` call this themselves.
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
        self._versions.load(saved["stages"][self.stage].get("kept", {}))
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
        return Terms(self.recipe.name, k, list(self.delays), self.flush_every, self.seed, self.replicas)

    def _state(self) -> StageState:
        return StageState(self.stash, self.optimizer, self.module)

    # ------------------------------------------------------------------ events

    def _prepare(self) -> None:
        """Agree with the neighbours on shapes and dtypes, with the next microbatch as an example."""
        inputs, targets = self._example()
        with self._autocasting():
            self._engine.prepare(inputs, targets)
        for channel in self._links.channels():
            channel.next_to_post = self.microbatches
            channel.waited = 0.0
        self._prepared = True

    def _example(self) -> tuple[tuple[Any, ...], Tensor | None]:
        if not (self.is_first or self.is_last):
            return (), None
        inputs, targets = self._asked(self.microbatches)
        if not isinstance(targets, Tensor):
            raise ValueError(f"the targets of a microbatch must be one tensor, not {type(targets).__name__}")
        return (inputs if isinstance(inputs, tuple) else (inputs,)) if self.is_first else (), targets

    def _asked(self, m: int) -> tuple[Any, Tensor]:
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

    def _receive(self, channel: Channel | None, m: int, post: Callable[[int], Any]) -> None:
        if channel is None:
            return
        while channel.next_to_post < min(m + 1 + self._receive_ahead, self.total):
            channel.post(channel.next_to_post, post(channel.next_to_post))
        with self.timeline.span("wait", m):
            channel.take(m)

    def _forward(self, m: int) -> None:
        self._receive(self._links.inputs, m, self._engine.receive_inputs)
        with self.timeline.span("forward", m):
            inputs, targets = self._asked(m) if self.is_first or self.is_last else ((), torch.empty(0))
            inputs = inputs if isinstance(inputs, tuple) else (inputs,)
            with ExitStack() as bound:
                bound.enter_context(self._versions.use(self._version(m), self.recipe.linearise_at))
                bound.enter_context(self._autocasting())
                with random_state(self.module, self.seed, self.stage, m * self.replicas + self.replica):
                    output = self._engine.forward(m, inputs)
                if self.is_last:
                    self._losses[m] = self.loss_fn(output, targets)
            if self._check_finite and not is_finite(self._losses[m] if self.is_last else output):
                what = f"the loss is {float(self._losses[m])}" if self.is_last else "an activation is not finite"
                raise PipelineError(f"{what} at microbatch {m + 1}, on stage {self.stage}")
        if self._links.outputs is not None:
            self._links.outputs.send(m, self._engine.outputs(m))

    def _backward(self, m: int) -> Tensor | None:
        self._receive(self._links.gradients_in, m, self._engine.receive_gradients)
        completes = (m + 1) % self.microbatches_per_update == 0
        with self.timeline.span("backward", m):
            if self._average is not None and completes:
                self._average.expect(self._version(m) % self.stash.versions)
            loss = self._losses.pop(m, None)
            with self._versions.during_backward(self._version(m), self.recipe.linearise_at):
                gradients = self._engine.backward(m, loss)
        if self._links.gradients_out is not None:
            self._links.gradients_out.send(m, gradients)
        if self._average is not None and completes:
            with self.timeline.span("average", m):
                self._average.finish()
        return None if loss is None else self._links.mean(loss.detach())

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
