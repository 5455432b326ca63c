"""The weight versions of a stage in a real pipeline, and what a checkpoint of the stage holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nesterov_pp.optim import StageOptimizer
from nesterov_pp.stash import Backward, WeightStash

if TYPE_CHECKING:
    from nesterov_pp.pipeline.asynchronous import AsyncPipeline

Weights = dict[str, Tensor]


class Versions:
    """Which weights a microbatch runs with: a ring's, or, without a stash, the newest ones.

    Without a stash (a ring of one) forwards of microbatches in flight cannot be run again after a restart unless the
    weights they began with were copied: ``kept``.
    """

    def __init__(self, stash: WeightStash, delay: int) -> None:
        self._stash, self._delay = stash, delay
        self._keep_from: int | None = None
        self.kept: dict[int, Weights] = {}

    def keep_from(self, version: int) -> None:
        """Copy the weights of every version from this one on, until the next call."""
        if self._stash.versions <= self._delay:
            self._keep_from = version
            self._copy()

    @contextmanager
    def use(self, version: int, backward: Backward) -> Iterator[None]:
        """The module computes with ``version``, for one microbatch."""
        if backward != "newest":
            with self._stash.use(version, backward=backward):
                yield
            return
        with self._as_it_was(version), self._stash.use(self._stash.newest, backward=backward):
            yield
        if self._stash.in_flight(self._stash.newest):
            self._stash.release(self._stash.newest)  # its backward takes whatever is newest then

    def during_backward(self, version: int, backward: Backward) -> AbstractContextManager[None]:
        """The module computes with the version of the microbatch whose backward is run, should it run again in it.

        A ring binds it too, but for compiled code that does not run as one.
        """
        return nullcontext() if backward == "newest" else self._stash.bind(version, backward=backward)

    def step(self, optimizer: StageOptimizer, version: int, microbatches: int) -> None:
        """Apply the gradients of ``version`` to the newest weights."""
        if self._stash.versions > self._delay:
            optimizer.step(version=version, microbatches=microbatches)
        else:
            optimizer.step(microbatches=microbatches)
            self._copy()

    def _copy(self) -> None:
        newest = self._stash.newest
        if self._keep_from is not None and newest >= self._keep_from:
            self.kept[newest] = {n: p.detach().clone() for n, p in self._stash.parameters(newest).items()}
        for gone in [v for v in self.kept if v < newest - self._delay]:
            del self.kept[gone]

    @contextmanager
    @torch.no_grad()
    def _as_it_was(self, version: int) -> Iterator[None]:
        """Older weights for a forward that is run again after a restart."""
        newest = self._stash.newest
        if version >= newest:
            yield
            return
        live = self._stash.parameters(newest)
        now = {n: p.detach().clone() for n, p in live.items()}
        try:
            for name, p in live.items():
                p.detach().copy_(self.kept[version][name])
            with torch.enable_grad():
                yield
        finally:
            for name, p in live.items():
                p.detach().copy_(now[name])


class StageState:
    """Saves and restores one stage of a pipeline."""

    def __init__(self, pipe: AsyncPipeline) -> None:
        self._pipe = pipe

    def memory(self) -> dict[str, int]:
        """Bytes by purpose."""
        pipe = self._pipe
        one = sum(_bytes(p) for p in pipe.stash.parameters(pipe.stash.newest).values())
        frozen = sum(_bytes(p) for p in pipe.module.parameters() if not p.requires_grad)
        states = [] if pipe.optimizer is None else list(pipe.optimizer.state.values())
        moments = sum(_bytes(t) for state in states for name, t in state.items() if name.startswith("exp_avg"))
        others = pipe.stash.versions - 1 + (pipe.stash.beside is not None)
        return {"weights": one + frozen, "stash": others * one, "moments": moments}

    def save(self) -> dict[str, Any]:
        """Raises: ValueError: an update is unfinished, or weights that are needed were not kept."""
        pipe = self._pipe
        waiting = pipe.microbatches % pipe.microbatches_per_update
        if waiting:
            raise ValueError(
                f"{waiting} microbatch(es) of an update are waiting; "
                f"save after a multiple of {pipe.microbatches_per_update} microbatches"
            )
        return {
            **self._identity(),
            "microbatches": pipe.microbatches,
            "stash": pipe.stash.state_dict(),
            "kept": self._kept(),
            "optimizer": None if pipe.optimizer is None else pipe.optimizer.state_dict(),
            "buffers": {n: b.detach() for n, b in pipe.module.named_buffers()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Raises: ValueError: it is of another stage or run."""
        pipe = self._pipe
        if not isinstance(state, dict) or not {"stash", "kept", "optimizer", "buffers", "microbatches"} <= state.keys():
            raise ValueError("load_state_dict takes what AsyncPipeline.state_dict() returned")
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(f"the saved stage has {name} {state.get(name)!r}, this one {value!r}")
        pipe.stash.load_state_dict(state["stash"])
        pipe._versions.kept = dict(state["kept"])
        if pipe.optimizer is not None:
            pipe.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, buffer in pipe.module.named_buffers():
                buffer.copy_(state["buffers"][name])

    def _identity(self) -> dict[str, Any]:
        pipe = self._pipe
        return {
            "method": pipe.recipe.name,
            "stage": pipe.stage,
            "delays": list(pipe.delays),
            "replicas": pipe.replicas,
            "microbatches_per_update": pipe.microbatches_per_update,
            "flush_every": pipe.flush_every,
            "seed": pipe.seed,
        }

    def _kept(self) -> dict[int, Weights]:
        pipe = self._pipe
        if pipe.stash.versions > pipe.delay or pipe.optimizer is None:
            return {}
        needed = sorted(v for v in pipe.versions_in_flight() if v < pipe.stash.newest)
        missing = [v for v in needed if v not in pipe._versions.kept]
        if missing:
            raise ValueError(
                f"microbatches in flight began with version {missing[0]}, which was not kept; "
                f"call keep_for({pipe.updates}) {pipe.delay} updates before"
            )
        return {v: pipe._versions.kept[v] for v in needed}


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()
