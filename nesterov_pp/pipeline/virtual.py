"""An asynchronous pipeline of any number of stages, emulated exactly in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nesterov_pp.optim import FusedOptimizer
from nesterov_pp.pipeline.delays import stage_delays, version_for_update
from nesterov_pp.pipeline.partition import stage_list
from nesterov_pp.pipeline.recipe import Placement, Recipe, find_recipe
from nesterov_pp.pipeline.schedule import drained_before
from nesterov_pp.pipeline.stage import build_optimizer, gpus_of, random_state, run_stage, set_learning_rate
from nesterov_pp.stash import WeightStash

LossFunction = Callable[[Any, Any], Tensor]


class VirtualPipeline:
    """Trains ``stages`` as a never-flushing pipeline would, one microbatch a call.

    Update ``t`` takes the gradient that its microbatches have at version ``max(0, t - tau_i)`` of stage ``i``'s
    weights, ``tau_i = floor((2 (P - i) + 1) / (2 K))``, and turns version ``t`` into version ``t + 1``. The losses and
    weights are those of the pipeline with P processes; with one stage, those of ordinary training.

    Args:
        stages: the stage modules in order, each mapping the output of the one before to its own, a tuple as several
            arguments; or an ``nn.Sequential`` with ``partition``.
        loss_fn: ``(output of the last stage, targets) -> 0-d tensor``, a mean over the microbatch.
        method: a name from ``recipes()``, or a ``Recipe``.
        lr: base learning rate; settable at any time as ``pipe.lr``.
        partition: for an ``nn.Sequential``: layers of each stage, or the number of stages.
        microbatches_per_update: K; default: the recipe's.
        flush_every: drain the pipeline after every so many updates and go on with all versions equal, as the paper's
            released code does every 1,000; default: never.
        max_grad_norm: clip each stage's gradient norm; default: no clipping.
        seed: makes random layers (dropout) depend on (seed, stage, microbatch) alone. Default: the global generator.
        backend: as for the optimizers.
        overrides: hyper-parameters of the recipe.

    The emulation keeps ``tau_i + 1`` versions of each stage's weights, also for recipes that need no stash in a real
    pipeline. Modules are left in the mode (training or evaluation) they are in.

    Raises:
        ValueError: unknown method or hyper-parameter, a bad partition, or parameters tied across stages.
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
        flush_every: int | None = None,
        max_grad_norm: float | None = None,
        seed: int | None = None,
        backend: str = "auto",
        **overrides: Any,
    ) -> None:
        recipe = find_recipe(method).override(overrides)
        self.stages = stage_list(stages, partition)
        if flush_every is not None and flush_every < 1:
            raise ValueError(f"flush_every must be at least 1 update, or None for never, not {flush_every}")
        k = recipe.microbatches_per_update if microbatches_per_update is None else microbatches_per_update
        delays = stage_delays(len(self.stages), k)
        self.recipe = recipe
        self.loss_fn = loss_fn
        self.lr = lr
        self.microbatches_per_update = k
        self.flush_every = flush_every
        self.seed = seed
        self.delays = delays if recipe.delayed else [0] * len(self.stages)
        self.microbatches = 0
        self.optimizer_seconds = 0.0
        self._gpus = [gpus_of(module) for module in self.stages]
        self.stashes = [WeightStash(m, tau + 1) for m, tau in zip(self.stages, self.delays, strict=True)]
        self.optimizers: list[FusedOptimizer | None] = []
        for i, (module, stash) in enumerate(zip(self.stages, self.stashes, strict=True)):
            placement = Placement(i + 1, len(self.stages), self.delays[i])
            self.optimizers.append(
                build_optimizer(recipe, module, stash, placement, lr=lr, max_grad_norm=max_grad_norm, backend=backend)
            )

    @property
    def updates(self) -> int:
        """Updates done."""
        return self.microbatches // self.microbatches_per_update

    def versions(self) -> list[int]:
        """The weight version that the next microbatch runs with, for each stage."""
        drained_at = drained_before(self.updates, self.flush_every)
        return [version_for_update(self.updates, tau, drained_at) for tau in self.delays]

    def step(self, inputs: Any, targets: Any) -> Tensor:
        """Take one microbatch through the delayed stages; every K-th ends in an update.

        Returns:
            The microbatch's loss, a detached 0-d tensor.
        """
        # A stage without trainable parameters has no optimizer and stays at version 0.
        versions = [min(v, s.newest) for v, s in zip(self.versions(), self.stashes, strict=True)]
        with ExitStack() as bound:
            hidden = inputs
            for i, (module, stash) in enumerate(zip(self.stages, self.stashes, strict=True)):
                bound.enter_context(stash.use(versions[i], backward=self.recipe.backward))
                with random_state(self.seed, i, self.microbatches, self._gpus[i]):
                    hidden = run_stage(module, hidden)
            loss = self.loss_fn(hidden, targets)
            loss.backward()  # type: ignore[no-untyped-call]
        self.microbatches += 1
        if self.microbatches % self.microbatches_per_update == 0:
            self._update(versions)
        return loss.detach()

    def predict(self, inputs: Any) -> Any:
        """The last stage's output with every stage's newest weights, in evaluation mode, without gradients."""
        modes = [module.training for module in self.stages]
        try:
            with torch.no_grad():
                hidden = inputs
                for module in self.stages:
                    hidden = run_stage(module.eval(), hidden)
                return hidden
        finally:
            for module, training in zip(self.stages, modes, strict=True):
                module.train(training)

    def evaluate(self, inputs: Any, targets: Any) -> Tensor:
        """The loss with every stage's newest weights, in evaluation mode, without gradients; a 0-d tensor."""
        output = self.predict(inputs)
        with torch.no_grad():
            return self.loss_fn(output, targets)

    def memory(self) -> dict[str, int]:
        """Bytes held: ``weights`` (one version of all stages), ``stash`` (the further versions), ``moments``."""
        one = [sum(p.numel() * p.element_size() for p in s.parameters(s.newest).values()) for s in self.stashes]
        frozen = sum(p.numel() * p.element_size() for m in self.stages for p in m.parameters() if not p.requires_grad)
        moments = sum(
            value.numel() * value.element_size()
            for optimizer in self.optimizers
            if optimizer is not None
            for state in optimizer.state.values()
            for name, value in state.items()
            if name.startswith("exp_avg")
        )
        return {
            "weights": sum(one) + frozen,
            "stash": sum(tau * size for tau, size in zip(self.delays, one, strict=True)),
            "moments": moments,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next ``step`` depends on, but the global random state; between updates only.

        Raises:
            ValueError: gradients of an unfinished update are waiting.
        """
        if self.microbatches % self.microbatches_per_update:
            raise ValueError(
                f"{self.microbatches % self.microbatches_per_update} microbatch(es) of an update are waiting; "
                f"save after a multiple of {self.microbatches_per_update} microbatches"
            )
        return {
            "method": self.recipe.name,
            "delays": list(self.delays),
            "microbatches": self.microbatches,
            "stashes": [stash.state_dict() for stash in self.stashes],
            "optimizers": [None if o is None else o.state_dict() for o in self.optimizers],
            "buffers": [{n: b.detach() for n, b in m.named_buffers()} for m in self.stages],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            ValueError: the state is of another method or other delays.
        """
        if state["method"] != self.recipe.name or list(state["delays"]) != self.delays:
            raise ValueError(
                f"the saved pipeline is {state['method']!r} with delays {list(state['delays'])}, "
                f"this one {self.recipe.name!r} with {self.delays}"
            )
        for stash, saved in zip(self.stashes, state["stashes"], strict=True):
            stash.load_state_dict(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            if optimizer is not None:
                optimizer.load_state_dict(saved)
        for module, saved in zip(self.stages, state["buffers"], strict=True):
            for name, buffer in module.named_buffers():
                buffer.copy_(saved[name])
        self.microbatches = int(state["microbatches"])

    def _update(self, versions: list[int]) -> None:
        update = self.updates - 1
        start = time.perf_counter()
        for i, optimizer in enumerate(self.optimizers):
            if optimizer is None:
                continue
            set_learning_rate(optimizer, self.recipe, self.delays[i], update, self.lr)
            optimizer.step(version=versions[i], microbatches=self.microbatches_per_update)
        self.optimizer_seconds += time.perf_counter() - start
