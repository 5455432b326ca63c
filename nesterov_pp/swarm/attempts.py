"""What the scheduler knows: workers, microbatches on their way, the versions of a stage; and what it asks for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from nesterov_pp.swarm.lineage import ROOT, Update


@dataclass
class Worker:
    """A living worker: its stage, its address, its seconds a microbatch, and whether it has the stage's weights."""

    name: str
    stage: int
    address: str
    seconds: float | None = None
    ready: bool = False


@dataclass
class Attempt:
    """A microbatch on its way, begun at a time. ``count`` says which stages take its gradient.

    ``recalled`` says who has yet to drop it, if it was called back, and ``since`` when that was. ``taken`` is the stage
    whose worker died and whose peer has still to finish its backward, ``before`` the one that died, and ``returned``
    says that the microbatch is through all the same. ``doubt`` says since when something could not be sent.
    """

    microbatch: int
    number: int
    route: list[Worker]
    count: list[bool]
    begun: float = 0.0
    recalled: set[str] | None = None
    since: float = 0.0
    after: float = 0.0
    taken: int | None = None
    before: str = ""
    taken_since: float = 0.0
    returned: bool = False
    doubt: float | None = None


@dataclass(frozen=True)
class Start:
    attempt: Attempt


@dataclass(frozen=True)
class Cancel:
    worker: str
    microbatch: int
    attempt: int


@dataclass(frozen=True)
class Replace:
    """A worker of ``stage`` has died; the one that is on the attempt's route now takes over."""

    attempt: Attempt
    stage: int


Action = Start | Cancel | Replace


@dataclass
class Line:
    """The versions of a stage: the parents of all, and the present line, with the microbatches that it has counted."""

    head: str = ROOT
    counted: Counter[int] = field(default_factory=Counter)
    _updates: dict[str, Update] = field(default_factory=dict)

    def add(self, update: Update) -> bool:
        """Take an update; return whether it is new. One that does not follow the head changes the line."""
        if update.name in self._updates:
            return False
        self._updates[update.name] = update
        if update.parent == self.head:
            self.head = update.name
            self.counted.update(one.microbatch for one in update.contributions)
        else:
            self.go_on_from(update.name)
        return True

    def go_on_from(self, version: str) -> None:
        """Make another version the head, and count again."""
        self.head, self.counted = version, Counter()
        while version in self._updates:
            update = self._updates[version]
            self.counted.update(one.microbatch for one in update.contributions)
            version = update.parent
