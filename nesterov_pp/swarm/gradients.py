"""The gradients that a worker has found and no update has taken yet."""

from __future__ import annotations

import threading

from torch import Tensor

from nesterov_pp.swarm.lineage import Contribution


class Gradients:
    """A sum of gradients in the order in which they came, and a part of it that an update in the making may have taken.

    A frozen bundle does not change: if the round in which it was sent fails, it is sent again as it is, because some
    worker may have made an update with it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Contribution] = []
        self._sums: list[Tensor] = []
        self._frozen: tuple[list[Contribution], list[Tensor]] | None = None

    def add(self, one: Contribution, gradients: list[Tensor]) -> None:
        """Add a microbatch's gradients, which become part of the sum."""
        with self._lock:
            self._open.append(one)
            if not self._sums:
                self._sums = gradients
                return
            for total, gradient in zip(self._sums, gradients, strict=True):
                total.add_(gradient)

    def freeze(self) -> tuple[list[Contribution], list[Tensor]]:
        """Return the bundle of the next round, which is empty if there are no gradients."""
        with self._lock:
            if self._frozen is None and self._open:
                self._frozen = self._open, self._sums
                self._open, self._sums = [], []
            return self._frozen or ([], [])

    def taken(self) -> None:
        """Forget the frozen bundle, which is part of an update."""
        with self._lock:
            self._frozen = None

    def drop(self) -> list[int]:
        """Forget everything, and return the microbatches whose gradients are gone."""
        with self._lock:
            gone = [*(self._frozen or ([], []))[0], *self._open]
            self._open, self._sums, self._frozen = [], [], None
            return [one.microbatch for one in gone]

    @property
    def waiting(self) -> list[int]:
        """The microbatches whose gradients are here."""
        with self._lock:
            return [one.microbatch for one in [*(self._frozen or ([], []))[0], *self._open]]
