"""What a worker computes: forwards, backwards and steps of one stage, in the order in which it is asked."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nesterov_pp.pipeline.losses import loss_of
from nesterov_pp.pipeline.stage import build_stash, random_state, run_stage
from nesterov_pp.pipeline.stage_state import StageState
from nesterov_pp.swarm.lineage import ROOT, Update, number_of
from nesterov_pp.swarm.task import Task


@dataclass
class Held:
    """A microbatch between its forward and its backward. ``output`` is None once its version has left the ring."""

    microbatch: int
    input: Tensor
    output: Tensor | None
    version: str


@dataclass(frozen=True)
class Gradient:
    """What a backward has found: for the earlier stage, for this one's weights, and how."""

    of_input: Tensor | None
    of_weights: list[Tensor]
    graph: str
    at: str


class StageCore:
    """One stage (from 0) of a task, with its ring and optimizer. Not for several threads at once."""

    def __init__(self, task: Task, stage: int) -> None:
        self.task, self.stage = task, stage
        self.module = task.build(stage)
        self.stash = build_stash(task.recipe, self.module, task.versions if task.stashes else 1)
        self.optimizer = task.optimizer(stage, self.module, self.stash)
        self.version, self.counted = ROOT, 0
        self._names = {0: ROOT}
        self._held: dict[Any, Held] = {}
        self._state = StageState(self.stash, self.optimizer, self.module)

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.task.stages - 1

    @property
    def shapes(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """The dtypes and shapes of the gradients, in their order."""
        return [(p.dtype, tuple(p.shape)) for p in self.stash.parameters(self.stash.newest).values()]

    @property
    def held(self) -> int:
        return len(self._held)

    def forward(self, key: Any, microbatch: int, given: Tensor, version: str | None = None) -> tuple[Tensor, str]:
        """Run a microbatch forward and keep it under ``key``; return the output and the version of the weights.

        The version is the one asked for if the ring has it, otherwise the newest.
        """
        found = Held(microbatch, given, None, self.version)
        found.output = self._forward(found, version if version in self._names.values() else None)
        self._held[key] = found
        return found.output.detach(), found.version

    def _forward(self, held: Held, version: str | None = None) -> Tensor:
        held.version = version or self.version
        if not self.is_first:
            held.input = held.input.detach().requires_grad_()
        number = number_of(held.version)
        with (
            self.stash.use(number, linearise_at=self.task.recipe.linearise_at),
            random_state(self.module, self.task.seed, self.stage, held.microbatch),
        ):
            output: Tensor = run_stage(self.module, held.input)
        # What is in flight is counted here: a step takes gradients of all versions, and would uncount those of one.
        self.stash.release(number)
        return output

    def output(self, key: Any) -> Tensor | None:
        """Return what the forward of a held microbatch gave; None if its version has left the ring."""
        output = self._held[key].output
        return None if output is None else output.detach()

    def loss(self, key: Any, targets: Tensor) -> Tensor:
        """Return the loss of a microbatch on the last stage, a 0-d tensor, and keep it as the output."""
        held = self._held[key]
        assert held.output is not None
        held.output = loss_of(self.task.loss_fn(held.output, targets)).mean
        return held.output.detach()

    def backward(self, key: Any, gradient: Tensor | None) -> Gradient:
        """Run a microbatch backward (``gradient`` None: from its loss), and forget it.

        If the version of its forward has left the ring, the forward runs again first, at the newest weights.
        """
        held = self._held.pop(key)
        if held.output is None:
            held.output = self._forward(held)
        number = number_of(held.version)
        bound = self.stash.bind(number) if self.task.stashes else nullcontext()
        with bound:
            torch.autograd.backward(held.output, gradient)
        leaves = self.stash.parameters(number if self.task.stashes else self.stash.newest).values()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
        for p in leaves:
            p.grad = None
        at = held.version if self.task.stashes else self.version
        return Gradient(None if self.is_first else held.input.grad, found, held.version, at)

    def drop(self, key: Any) -> bool:
        """Forget a microbatch; return whether it was held."""
        return self._held.pop(key, None) is not None

    def drop_all(self) -> list[Any]:
        """Forget all microbatches, and return their keys."""
        keys = list(self._held)
        self._held.clear()
        return keys

    def apply(self, update: Update, sums: list[Tensor]) -> None:
        """Make the next version with an update and the sums of its gradients.

        Raises:
            ValueError: the update is one of another version.
        """
        if update.parent != self.version:
            raise ValueError(f"an update of version {update.parent} cannot be applied to version {self.version}")
        self._make_room()
        self.counted = self.task.step(self.optimizer, self.stash, update, sums, self.counted)
        self._now_at(update.name)

    def _now_at(self, version: str, others: Iterable[str] = ()) -> None:
        """Make a version the newest. ``others`` are further ones of the ring."""
        self.version = version
        self._names.update({number_of(name): name for name in (*others, version)})
        self._names = {n: name for n, name in self._names.items() if self.stash.oldest <= n <= self.stash.newest}

    def _make_room(self) -> None:
        leaving = self.stash.newest + 1 - self.stash.versions
        for held in self._held.values():
            if self.task.stashes and held.output is not None and number_of(held.version) == leaving:
                held.output = None

    @torch.no_grad()
    def state(self) -> dict[str, Any]:
        """Return a copy of all that another worker of the stage needs to be its equal."""
        saved = {"version": self.version, "counted": self.counted, "stage": self.stage, **self._state.save()}
        saved["names"] = list(self._names.values())
        copied: dict[str, Any] = cloned(saved)
        return copied

    def load(self, state: dict[str, Any]) -> None:
        """Take over the state of another worker; what is held must have been dropped.

        Raises:
            ValueError: it is the state of another stage or task; nothing is changed.
        """
        if state.get("stage") != self.stage:
            raise ValueError(f"the state of stage {state.get('stage')} is not one of stage {self.stage}")
        self._state.check(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self._state.load_weights(state)
        self._names.clear()
        self._now_at(state["version"], state["names"])
        self.counted = state["counted"]


def cloned(value: Any) -> Any:
    """Return a nest with copies of its tensors, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: cloned(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(cloned, value))
    return value
