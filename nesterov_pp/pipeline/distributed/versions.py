"""The weight versions that a stage's microbatches run with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nesterov_pp.pipeline.recipe import StageOptimizer
from nesterov_pp.stash import LineariseAt, WeightStash

Weights = dict[str, Tensor]


class Versions:
    """The weights that a microbatch runs with: a version of the ring or, without a stash, the newest weights.

    Without a stash (a ring of one), the forwards of microbatches in flight can run again after a restart only if the
    weights that they began with were copied; with a stash that keeps older versions in a short form, they run again
    exactly only then. ``kept`` holds these copies; without a stash, a version's lacks the parameters that were frozen
    in it, which have not moved since as long as a microbatch that began with it is in flight.
    """

    def __init__(self, stash: WeightStash, delay: int) -> None:
        self._stash, self._delay = stash, delay
        self._announced: set[int] = set()
        self.kept: dict[int, Weights] = {}

    def keep_for(self, update: int) -> None:
        """Announce a checkpoint after ``update`` updates, and copy from now on the weights that it needs."""
        if not self._all_exact():
            self._announced.add(update)
            self._copy()

    def missing(self, in_flight: Iterable[int]) -> list[int]:
        """Return the versions in flight that a checkpoint needs, but that neither the ring nor a copy holds."""
        older = sorted(v for v in in_flight if v < self._stash.newest)
        return [] if self._all_exact() else [v for v in older if v not in self.kept]

    def needed(self, in_flight: Iterable[int]) -> dict[int, Weights]:
        """Return the copies that a checkpoint needs for the versions in flight; none if the ring holds them all.

        Raises:
            ValueError: a version in flight was not kept.
        """
        if self._all_exact():
            return {}
        newest, in_flight = self._stash.newest, set(in_flight)
        missing = self.missing(in_flight)
        if missing:
            raise ValueError(
                f"microbatches in flight began with version {missing[0]}, which was not kept; call save with every= "
                f"after every step, or keep_for({newest}) {self._delay} updates earlier"
            )
        return {v: self.kept[v] for v in sorted(in_flight) if v < newest}

    def load(self, kept: Mapping[int, Weights], ring: Mapping[str, Any]) -> None:
        """Restore the copies that ``needed`` returned, or take those in the state of a ring that had them all."""
        weights, newest = ring["weights"], ring["newest"]
        full = {newest - k: w for k, w in enumerate(reversed(weights)) if k and not self._all_exact()}
        self.kept = {**full, **kept}

    @contextmanager
    def use(self, version: int, linearise_at: LineariseAt) -> Iterator[None]:
        """Bind the module to ``version`` inside the block, for one microbatch."""
        if linearise_at != "newest":
            weights = self.kept.get(version) if version < self._stash.newest else None
            with self._stash.use(version, linearise_at=linearise_at, weights=weights):
                yield
            return
        with self._as_it_was(version), self._stash.use(self._stash.newest, linearise_at=linearise_at):
            if version == self._stash.newest and version in self.kept:
                live = self._stash.parameters(version)
                self.kept[version] = {n: w for n, w in self.kept[version].items() if live[n].requires_grad}
            yield
        if self._stash.in_flight(self._stash.newest):
            self._stash.release(self._stash.newest)  # its backward uses the weights that are newest then

    def during_backward(self, version: int, linearise_at: LineariseAt) -> AbstractContextManager[None]:
        """Return a context that binds the module to the version of the microbatch whose backward runs.

        The module may run again in that backward. A ring binds it too, except for compiled code that does not run as a
        module.
        """
        return nullcontext() if linearise_at == "newest" else self._stash.bind(version, linearise_at=linearise_at)

    def with_gradients(self, version: int) -> list[Tensor]:
        """Return the parameters that hold the gradients of microbatches that ran with ``version``."""
        holder = self._stash.gather_gradients([version if self._all_stashed() else self._stash.newest])
        return list(self._stash.parameters(holder).values())

    def step(self, optimizer: StageOptimizer, version: int, microbatches: int) -> None:
        """Apply the gradients of ``version`` to the newest weights."""
        if self._all_stashed():
            optimizer.step(version=version, microbatches=microbatches)
        else:
            optimizer.step(microbatches=microbatches)
        if not self._all_exact():
            self._copy()

    def _all_stashed(self) -> bool:
        """Return whether the ring holds every version that a microbatch in flight can have."""
        return self._stash.versions > self._delay

    def _all_exact(self) -> bool:
        """Return whether the ring holds them as they were, so that a forward can run again."""
        return self._all_stashed() and self._stash.keeps_exactly

    def _copy(self) -> None:
        newest = self._stash.newest
        self._announced = {update for update in self._announced if update >= newest}
        if newest not in self.kept and any(update - self._delay <= newest for update in self._announced):
            self.kept[newest] = {n: p.detach().clone() for n, p in self._stash.parameters(newest).items()}
        for gone in [v for v in self.kept if v < newest - self._delay]:
            del self.kept[gone]

    @contextmanager
    @torch.no_grad()
    def _as_it_was(self, version: int) -> Iterator[None]:
        """Put older weights back inside the block, for a forward that runs again after a restart."""
        newest = self._stash.newest
        if version >= newest:
            yield
            return
        live, then = self._stash.parameters(newest), self.kept[version]
        now = {n: live[n].detach().clone() for n in then}
        resting = [p for n, p in live.items() if n not in then and p.requires_grad]
        try:
            for p in resting:
                p.requires_grad_(False)
            for name, weights in then.items():
                live[name].detach().copy_(weights)
            with torch.enable_grad():
                yield
        finally:
            for name, weights in now.items():
                live[name].detach().copy_(weights)
            for p in resting:
                p.requires_grad_(True)
