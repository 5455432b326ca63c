"""Microbatches by number from a loader that gives them in turn, with a position that can be saved."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Saved = dict[str, Any]


class Batches:
    """Microbatches by number from ``loader``, an iterable of ``(inputs, targets)`` such as a ``DataLoader``.

    ``batches(m)`` returns microbatch m = 0, 1, ... At its end the loader is iterated again, after
    ``set_epoch(epoch)`` on the loader or its sampler where they have it. The loader draws from torch's random numbers
    in a state of its own, seeded by ``seed``, so that all processes that use an equal loader see the same microbatches
    in the same order, whatever else they draw.

    A loader with ``state_dict`` and ``load_state_dict``, such as torchdata's ``StatefulDataLoader``, is restored by
    them. Any other is iterated again from the beginning of the epoch, and what was used already is skipped.

    Args:
        loader: the iterable; every iteration over it must begin anew.
        seed: seed of its random numbers.
        window: how many of the last microbatches can be asked for again, and are kept in memory.

    Raises:
        ValueError: (from ``batches(m)``) m was asked for too long ago, or the loader is empty or cannot be iterated
            again.
    """

    def __init__(self, loader: Iterable[Any], *, seed: int = 0, window: int = 1) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 microbatch, not {window}")
        self._loader = loader
        self._iterator: Iterator[Any] | None = None
        self._recent: deque[Any] = deque(maxlen=window)
        self._drawn = self._epoch = self._of_epoch = 0
        self._random = torch.Generator().manual_seed(seed).get_state()
        self._at_epoch: Saved = {}

    def __call__(self, number: int) -> Any:
        first = self._drawn - len(self._recent)
        if number < first:
            raise ValueError(
                f"microbatch {number} was asked for after microbatch {self._drawn - 1}, but only the last "
                f"{self._recent.maxlen} can be asked for again"
            )
        while number >= self._drawn:
            self._recent.append(self._draw())
            self._drawn += 1
        return self._recent[number - self._drawn]

    def state_dict(self) -> Saved:
        """Return the position after the last microbatch that was asked for."""
        return self.state_at(self._drawn)

    def state_at(self, number: int) -> Saved:
        """Return the position before microbatch ``number``, or after the last one if that comes earlier.

        Microbatches from there to the newest are in the state themselves.

        Raises:
            ValueError: the microbatch is not one of the last ``window``.
        """
        again = max(0, self._drawn - number)
        if again > len(self._recent):
            raise ValueError(f"the position before microbatch {number} is not known after {self._drawn} microbatches")
        loader: Any = self._loader
        of_loader = loader.state_dict() if _is_stateful(loader) and self._iterator is not None else None
        return {
            "drawn": self._drawn,
            "again": list(self._recent)[len(self._recent) - again :],
            "epoch": self._epoch,
            "of_epoch": self._of_epoch,
            "random": self._random,
            "at_epoch": self._at_epoch,
            "loader": of_loader,
        }

    def load_state_dict(self, state: Saved) -> None:
        """Continue at a position that ``state_dict`` or ``state_at`` returned for an equal loader.

        Raises:
            ValueError: the loader ends before this position.
        """
        self._recent.clear()
        self._recent.extend(state["again"])
        self._drawn, self._epoch, self._of_epoch = state["drawn"], state["epoch"], state["of_epoch"]
        self._at_epoch, self._iterator = state["at_epoch"], None
        if state["loader"] is not None:
            self._random = state["random"]
            self._loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]
            with self._own_random():
                self._iterator = iter(self._loader)
        elif self._at_epoch:
            self._skip(self._of_epoch)
        else:
            self._random = state["random"]

    def _skip(self, count: int) -> None:
        """Begin the epoch again, and go on to after its ``count``-th microbatch."""
        self._random = self._at_epoch["random"]
        for generator, saved in zip(_generators(self._loader), self._at_epoch["generators"], strict=True):
            generator.set_state(saved)
        with self._own_random():
            self._iterator = self._begun()
            for k in range(count):
                if next(self._iterator, self) is self:
                    raise ValueError(f"the loader ends after {k} of the {count} microbatches that were used before")

    def _draw(self) -> Any:
        with self._own_random():
            if self._iterator is None:
                self._iterator = self._begun()
            try:
                batch = next(self._iterator)
            except StopIteration:
                if not self._of_epoch:
                    again = "cannot be iterated again" if self._epoch else "is empty"
                    raise ValueError(f"the loader {again}; it must give microbatches every time") from None
                self._epoch, self._of_epoch, self._iterator = self._epoch + 1, 0, None
                batch = None
            else:
                self._of_epoch += 1
                return batch
        return self._draw()

    def _begun(self) -> Iterator[Any]:
        self._at_epoch = {
            "random": torch.get_rng_state(),
            "generators": [generator.get_state() for generator in _generators(self._loader)],
        }
        for part in (self._loader, getattr(self._loader, "sampler", None)):
            set_epoch: Callable[[int], object] | None = getattr(part, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self._epoch)
        return iter(self._loader)

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            yield
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(outside)


def _is_stateful(loader: object) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _generators(loader: object) -> list[torch.Generator]:
    """Return the generators that a ``DataLoader`` draws from."""
    found: dict[int, torch.Generator] = {}
    for part in (loader, getattr(loader, "sampler", None)):
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
    return list(found.values())


def as_batches(batch: Callable[[int], tuple[Any, Tensor]] | Iterable[Any], seed: int, window: int) -> Any:
    """Return ``batch``, or ``Batches`` from it if it is a loader instead of a function."""
    if callable(batch):
        return batch
    if not isinstance(batch, Iterable):
        raise ValueError(
            f"batch must be a function m -> (inputs, targets) or a loader of them, not {type(batch).__name__}"
        )
    return Batches(batch, seed=seed, window=window)
