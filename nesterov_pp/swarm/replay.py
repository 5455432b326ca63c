"""A swarm's run computed again in one process from its trace: the proof that the swarm did what its trace says.

Nothing here is shared with a worker but the optimizer's step: weights of every version are kept as they were, forwards
and backwards run on plain copies of them, stage by stage, and a gradient that was differentiated at other weights than
those of its forward is computed with these swapped in for autograd. On the CPU in float32 with as many threads, the
losses and the weights are those of the run, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from nesterov_pp.pipeline.losses import loss_of
from nesterov_pp.pipeline.stage import build_stash, random_state
from nesterov_pp.stash.linearise import saved_elsewhere
from nesterov_pp.swarm.core import cloned
from nesterov_pp.swarm.lineage import ROOT, Contribution, Update
from nesterov_pp.swarm.task import Task

Weights = list[Tensor]


class Replayed(NamedTuple):
    """What a replay has found.

    Attributes:
        losses: for every run of a microbatch from end to end, its number, the loss recorded and the loss computed, both
            as ``float.hex``. A microbatch that was sent again may have several.
        weights: the weights of each stage at the version asked for, by name.
    """

    losses: list[tuple[int, str, str]]
    weights: list[dict[str, Tensor]]

    @property
    def unlike(self) -> list[int]:
        """The microbatches whose losses differ."""
        return [m for m, recorded, computed in self.losses if recorded != computed]


class _Stage:
    """All versions of a stage that something still needs."""

    def __init__(self, task: Task, stage: int, uses: Counter[str]) -> None:
        self.task, self.stage = task, stage
        self.module = task.build(stage)
        self.stash = build_stash(task.recipe, self.module, 1)
        self.optimizer = task.optimizer(stage, self.module, self.stash)
        self.names = self.stash.names
        self.weights: dict[str, Weights] = {ROOT: self._copy()}
        self._states: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {ROOT: self._state(0)}
        self._at, self._uses = ROOT, uses

    def _copy(self) -> Weights:
        return [p.detach().clone() for p in self.stash.weights().values()]

    def _state(self, counted: int) -> tuple[dict[str, Any], dict[str, Any], int]:
        return cloned(self.optimizer.state_dict()), cloned(self.stash.state_dict()), counted

    def apply(self, update: Update, sums: Weights) -> None:
        optimizer, ring, counted = self._states[update.parent]
        if self._at != update.parent:
            self.optimizer.load_state_dict(cloned(optimizer))
            self.stash.load_state_dict(cloned(ring))
        counted = self.task.step(self.optimizer, self.stash, update, sums, counted)
        self._at = update.name
        self.weights[update.name] = self._copy()
        self._states[update.name] = self._state(counted)
        self.used(update.parent)
        self.used(update.name, 0)

    def used(self, version: str, times: int = 1) -> None:
        self._uses[version] -= times
        if not self._uses[version]:
            self.weights.pop(version, None)
            self._states.pop(version, None)


class _Path(NamedTuple):
    microbatch: int
    forward: tuple[str, ...]


def replay(task: Task, updates: Sequence[Update], final: Sequence[str]) -> Replayed:
    """Compute the updates of a trace.

    Args:
        task: what the swarm trained.
        updates: all of its updates, in any order.
        final: the version of each stage whose weights to return.

    Raises:
        ValueError: an update depends on a version that no update of the trace makes.
    """
    return _Replay(task, updates, final).run()


class _Replay:
    def __init__(self, task: Task, updates: Sequence[Update], final: Sequence[str]) -> None:
        self.task, self.final = task, final
        self.updates = {update.name: update for update in updates}
        uses: list[Counter[str]] = [Counter({name: 1}) for name in final]
        for update in self.updates.values():
            uses[update.stage][update.parent] += 1
        self.stages = [_Stage(task, s, uses[s]) for s in range(task.stages)]
        # A version is needed until the last update that mentions it has been computed.
        for update in self.updates.values():
            for stage, version in _mentioned(update):
                uses[stage][version] += 1
        # What several updates share: the output of a stage for a path, and the gradient that it hands back.
        self.outputs: dict[Any, Tensor] = {}
        self.handed: dict[Any, Tensor | None] = {}
        self.of_weights: dict[Any, Weights] = {}
        self.users: Counter[int] = Counter(
            one.microbatch for update in self.updates.values() for one in update.contributions
        )
        self.computed: dict[Any, str] = {}
        self.losses: dict[tuple[int, str, str], None] = {}

    def run(self) -> Replayed:
        waiting = sorted(self.updates.values(), key=lambda update: (update.number, update.stage))
        while waiting:
            later = [update for update in waiting if not self._apply(update)]
            if len(later) == len(waiting):
                raise ValueError(f"the trace lacks an update on which version {later[0].name} depends")
            waiting = later
        weights = []
        for stage, name in zip(self.stages, self.final, strict=True):
            if name not in stage.weights:
                raise ValueError(f"the trace has no version {name} of stage {stage.stage}")
            weights.append(dict(zip(stage.names, stage.weights[name], strict=True)))
        return Replayed(list(self.losses), weights)

    def _apply(self, update: Update) -> bool:
        if update.parent not in self.stages[update.stage].weights:
            return False
        if any(version not in self.stages[stage].weights for stage, version in _mentioned(update)):
            return False
        sums: Weights | None = None
        for bundle in update.bundles:
            part: Weights | None = None
            for one in bundle:
                found = self._gradient(update.stage, one)
                part = (
                    [g.clone() for g in found]
                    if part is None
                    else [a.add_(g) for a, g in zip(part, found, strict=True)]
                )
            assert part is not None
            sums = part if sums is None else [a.add_(b) for a, b in zip(sums, part, strict=True)]
        assert sums is not None
        self.stages[update.stage].apply(update, sums)
        for stage, version in _mentioned(update):
            self.stages[stage].used(version)
        for one in update.contributions:
            self._used(one.microbatch)
        return True

    def _used(self, microbatch: int) -> None:
        self.users[microbatch] -= 1
        if not self.users[microbatch]:
            for table in (self.outputs, self.handed, self.of_weights, self.computed):
                for key in [key for key in table if key[0].microbatch == microbatch]:
                    del table[key]

    def _gradient(self, stage: int, one: Contribution) -> Weights:
        """Return the gradient of a stage's weights, computing all stages behind it that have not been."""
        path = _Path(one.microbatch, one.forward)
        gradient: Tensor | None = None
        for s in reversed(range(stage, self.task.stages)):
            key = (path, s, one.backward[s - stage :])
            if key not in self.handed:
                self.handed[key], self.of_weights[key] = self._backward(key, *one.backward[s - stage], gradient)
            gradient = self.handed[key]
        computed = self.computed[path, self.task.stages - 1, one.backward[-1:]]
        self.losses[one.microbatch, one.loss, computed] = None
        return self.of_weights[(path, stage, one.backward)]

    def _input(self, path: _Path, stage: int) -> Tensor:
        if stage == 0:
            return self.task.batch(path.microbatch)[0]
        key = (path._replace(forward=path.forward[:stage]), stage)
        if key not in self.outputs:
            given = _leaf(self._input(path, stage - 1), stage > 1)
            weights = [_leaf(w) for w in self.stages[stage - 1].weights[path.forward[stage - 1]]]
            self.outputs[key] = self._run(path.microbatch, stage - 1, weights, given).detach()
        return self.outputs[key]

    def _run(self, microbatch: int, stage: int, weights: Weights, given: Tensor) -> Tensor:
        at = self.stages[stage]
        with random_state(at.module, self.task.seed, stage, microbatch):
            output: Tensor = functional_call(at.module, dict(zip(at.names, weights, strict=True)), (given,))
        return output

    def _backward(
        self, key: tuple[_Path, int, Any], graph: str, at: str, gradient: Tensor | None
    ) -> tuple[Tensor | None, Weights]:
        path, stage, _ = key
        versions = self.stages[stage].weights
        given = _leaf(self._input(path, stage), stage > 0)
        leaves = [_leaf(w) for w in versions[graph]]
        with nullcontext() if graph == at else saved_elsewhere([leaves], versions[at].__getitem__):
            output = self._run(path.microbatch, stage, leaves, given)
        if stage == self.task.stages - 1:
            output = loss_of(self.task.loss_fn(output, self.task.batch(path.microbatch)[1])).mean
            self.computed[key] = float(output.detach()).hex()
        torch.autograd.backward(output, gradient)
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
        return (given.grad if stage else None), found


def _leaf(t: Tensor, differentiated: bool = True) -> Tensor:
    return t.detach().requires_grad_(differentiated)


def _mentioned(update: Update) -> list[tuple[int, str]]:
    """Return the stages and versions that an update's gradients depend on."""
    found = []
    for one in update.contributions:
        found += list(enumerate(one.forward))
        for s, pair in enumerate(one.backward, start=update.stage):
            found += [(s, name) for name in pair]
    return found
