"""The versions that a ring holds, and the microbatches that use them.

[note: why a position is one object]
A step that is interrupted, by Ctrl-C or for lack of memory, must not leave weights of one version under the number of
another. So everything that a step changes in the ring itself is in one immutable ``_State``, and counting a step is one
assignment. Clearing gradients and binding the module follow afterwards; if they are interrupted, the next call does
them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class _State(NamedTuple):
    """The state of a ring. ``in_flight`` counts the microbatches of each version; it is never changed in place."""

    newest: int = 0
    in_flight: Mapping[int, int] = MappingProxyType({})
    to_clear: tuple[int, ...] = ()
    loads: int = 0

    def counting(self, version: int, microbatches: int) -> _State:
        """Return the state with ``microbatches`` more in flight on a version, or fewer if negative."""
        left = {**self.in_flight, version: self.in_flight.get(version, 0) + microbatches}
        return self._replace(in_flight={v: n for v, n in left.items() if n > 0})


class Position:
    """The position of a ring of ``versions`` versions. Version ``v`` lives in slot ``v % slots``.

    There are as many slots as versions, or more.
    """

    def __init__(self, versions: int, slots: int) -> None:
        self.versions, self.slots = versions, slots
        self._state = _State()
        self._next = 0

    @property
    def newest(self) -> int:
        return self._state.newest

    @property
    def oldest(self) -> int:
        return max(0, self.newest - self.versions + 1)

    @property
    def newest_slot(self) -> int:
        return self.newest % self.slots

    @property
    def loads(self) -> int:
        """The number of times that the ring was loaded."""
        return self._state.loads

    @property
    def to_clear(self) -> tuple[int, ...]:
        """Slots whose gradients are to be cleared after the last step, and have not been yet."""
        return self._state.to_clear

    def slot_of(self, version: int) -> int:
        """Return the slot of a version; raise ValueError if the version is not in the ring."""
        if not isinstance(version, int):
            raise ValueError(f"version must be a whole number, not {version!r}")
        if version > self.newest or version < 0:
            raise ValueError(f"version {version} does not exist; the newest is {self.newest}")
        if version < self.oldest:
            raise ValueError(
                f"version {version} has left the ring, which holds versions {self.oldest} to {self.newest}; "
                f"keep more than {self.versions} versions to reach further back"
            )
        return version % self.slots

    def in_flight(self, version: int) -> int:
        """Return how many microbatches used a version and have not been stepped."""
        return self._state.in_flight.get(version, 0)

    def count(self, version: int, microbatches: int) -> None:
        """Count ``microbatches`` more in flight on a version, or fewer if negative."""
        self._state = self._state.counting(version, microbatches)

    def move(self, versions: list[int], to: int) -> None:
        """Move the microbatches in flight on ``versions`` to version ``to``."""
        state = self._state
        for version in versions:
            moved = state.in_flight.get(version, 0)
            state = state.counting(version, -moved).counting(to, moved)
        self._state = state

    def check_step(self, version: int, microbatches: int) -> None:
        """Raise ValueError if a step would overwrite a version that other microbatches in flight need."""
        leaving = self.newest + 1 - self.versions
        waiting = self.in_flight(leaving) - (microbatches if leaving == version else 0)
        if leaving >= 0 and waiting > 0:
            raise ValueError(
                f"this step would overwrite version {leaving}, which {waiting} microbatch(es) in flight still need; "
                f"step or release them first, or keep more than {self.versions} versions"
            )

    def begin_step(self) -> None:
        """Announce the step to the version after the newest, which ``end_step`` counts next."""
        self._next = self.newest + 1

    def end_step(self, version: int | None, microbatches: int) -> None:
        """Count the step that ``begin_step`` announced; counts it only once, however often this is called."""
        state = self._state
        if state.newest >= self._next:
            return
        taken = state.newest if version is None else version
        counted = state.counting(taken, -microbatches)
        left = {v: n for v, n in counted.in_flight.items() if v > self._next - self.versions}
        slots = (taken % self.slots, self._next % self.slots)
        self._state = counted._replace(newest=self._next, in_flight=left, to_clear=slots)

    def cleared(self) -> None:
        """Note that the gradients of ``to_clear`` have been cleared."""
        self._state = self._state._replace(to_clear=())

    def load(self, newest: int) -> None:
        """Continue at another version, with no microbatch in flight."""
        self._state, self._next = _State(newest=newest, loads=self.loads + 1), newest
