"""Averaging within a stage: one round after another, each with the workers of one quorum.

In a round, every worker sends every other its bundle, the sum of its gradients so far (often none), and all add up the
bundles in the order of the workers' names. So all make the same update, bit for bit, and whoever has all bundles may
make it without asking. A worker whose version is not the newest takes over the state of one that has it; in such a
round there is no update, so that the state does not age while it travels. Computing goes on in another thread.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nesterov_pp.swarm.gradients import Gradients
from nesterov_pp.swarm.lineage import Contribution, MalformedError, Update, is_version, number_of
from nesterov_pp.swarm.messages import Header, Message, RefusedError
from nesterov_pp.swarm.peers import Peers
from nesterov_pp.swarm.quorum import Member, NoQuorumError, QuorumClient

IDLE_SECONDS = 0.5
"""A round is held at least so often, for whoever wants to join."""
QUORUM_SECONDS = 5.0
EXCHANGE_SECONDS = 5.0
SLOWEST_BYTES = 1e6
"""Bytes a second that bundles are expected to travel with at least: a worker whose bundle takes longer is left out."""
KEEP_SECONDS = 30.0
MOST_FAILURES = 8

Bundle = tuple[list[Contribution], list[Tensor]]


class HealError(Exception):
    """The state of another worker could not be taken over."""


class Host(Protocol):
    """The worker around the rounds."""

    def apply(self, update: Update, sums: list[Tensor]) -> None:
        """Have an update applied after those before it."""

    def behind(self) -> bool:
        """Whether too many updates wait to be applied."""

    def heal(self, member: Member) -> str:
        """Drop everything and take over a member's state; return its version. Raises HealError."""

    def report(self, header: Header) -> None:
        """Tell the coordinator."""


class Mailbox:
    """The bundles that have arrived, by round and worker."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._bundles: dict[str, dict[str, Bundle]] = {}
        self._since: dict[str, float] = {}
        self._failed: set[str] = set()
        self._gone: set[str] = set()

    def put(self, made: str, worker: str, bundle: Bundle) -> None:
        with self._changed:
            self._since.setdefault(made, time.monotonic())
            self._bundles.setdefault(made, {})[worker] = bundle
            self._changed.notify_all()

    def fail(self, made: str) -> None:
        """End the wait for a round that a worker has left."""
        with self._changed:
            self._failed.add(made)
            self._changed.notify_all()

    def gone(self, left: set[str], living: set[str]) -> None:
        """Note which workers, by address, are dead: nobody waits for them. They may come back."""
        with self._changed:
            self._gone = (self._gone | left) - living
            self._changed.notify_all()

    def wait(self, made: str, members: Sequence[Member], seconds: float) -> dict[str, Bundle] | None:
        """Return the bundles of a round from all members, or None if they do not come."""
        until = time.monotonic() + seconds
        with self._changed:
            while missing := [m for m in members if m.worker not in self._bundles.get(made, {})]:
                left = until - time.monotonic()
                if left <= 0 or made in self._failed or any(m.address in self._gone for m in missing):
                    self._forget(made)
                    return None
                self._changed.wait(left)
            found = self._bundles[made]
            self._forget(made)
            return found

    def _forget(self, made: str) -> None:
        old = [one for one, since in self._since.items() if time.monotonic() - since > KEEP_SECONDS]
        for one in {made, *old}:
            self._bundles.pop(one, None)
            self._since.pop(one, None)
            self._failed.discard(one)


class Rounds:
    """The rounds of one worker, in a thread of their own.

    ``version`` is the newest that this worker has agreed to; the one that it computes with follows.
    """

    def __init__(
        self,
        me: Member,
        stage: int,
        stages: int,
        shapes: list[tuple[torch.dtype, tuple[int, ...]]],
        client: QuorumClient,
        peers: Peers,
        gradients: Gradients,
        host: Host,
        ended: Callable[[str], None],
    ) -> None:
        self.version, self.begun = me.version, False
        self.mailbox, self.wanted = Mailbox(), threading.Event()
        self.team: list[str] = []
        self._slack = sum(dtype.itemsize * math.prod(shape) for dtype, shape in shapes) / SLOWEST_BYTES
        self._me, self._stage, self._stages, self._shapes = me, stage, stages, shapes
        self._client, self._peers, self._gradients, self._host = client, peers, gradients, host
        self._closing = threading.Event()
        self._ended, self._ready, self._failures = ended, False, 0
        self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the rounds, and wait for the thread: one that is inside torchft when Python ends would abort it."""
        self._closing.set()
        self.wanted.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(QUORUM_SECONDS + 1.0)
        self._client.close()

    def set_team(self, addresses: list[str]) -> None:
        """Take the addresses of the stage's living workers."""
        left = set(self.team) - set(addresses)
        self.team = addresses
        self.mailbox.gone(left, set(addresses))
        if left:
            self.wanted.set()

    def want(self) -> None:
        """Ask all workers of the stage for a round, because there is a gradient."""
        for address in self.team:
            if address != self._me.address:
                self._peers.send(address, {"kind": "poke"})
        self.wanted.set()

    def arrived(self, message: Message) -> None:
        """Take a bundle. Raises RefusedError."""
        header, tensors = message
        try:
            found = [Contribution.from_json(one, self._stages, self._stage) for one in header["contributions"]]
        except MalformedError as error:
            raise RefusedError(str(error)) from None
        if [(t.dtype, tuple(t.shape)) for t in tensors] != (self._shapes if found else []):
            raise RefusedError("a bundle whose tensors are not gradients of this stage")
        self.mailbox.put(header["round"], header["worker"], (found, tensors))

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self.wanted.wait(IDLE_SECONDS)
                self.wanted.clear()
                while self._host.behind() and not self._closing.is_set():
                    time.sleep(0.01)
                if not self._closing.is_set():
                    self._attempt()
        except Exception as error:
            self._ended(f"the rounds of this worker ended: {error!r}")

    def _attempt(self) -> None:
        try:
            self._round()
            self._failures = 0
        except NoQuorumError:
            self._closing.wait(0.2)
            self.wanted.set()
        except HealError as error:
            self._failures += 1
            if self._failures >= MOST_FAILURES:
                self._ended(f"the state of another worker could not be taken over {MOST_FAILURES} times: {error}")
                self._closing.set()
            self._closing.wait(0.3 * self._failures)
            self.wanted.set()

    def _round(self) -> None:
        quorum = self._client.ask(self.version, number_of(self.version), QUORUM_SECONDS)
        members = [member for member in quorum.members if is_version(member.version)]
        if self._me.worker not in {member.worker for member in members}:
            return
        newest = max((number_of(member.version), member.version) for member in members)[1]
        current = [member for member in members if member.version == newest]
        if self.version != newest:
            self._heal(random.choice(current))
            return
        if len(current) < len(members):
            self.wanted.set()
            return
        if len(current) == 1 and not self.begun:
            return
        self._is_ready()
        self._update(quorum.round, current)

    def _heal(self, member: Member) -> None:
        self.version = self._host.heal(member)
        self._is_ready(healed=True)
        self.wanted.set()

    def _is_ready(self, healed: bool = False) -> None:
        self.begun = True
        if healed or not self._ready:
            self._ready = True
            self._host.report({"kind": "ready", "version": self.version})

    def _update(self, made: str, members: list[Member]) -> None:
        contributions, sums = self._gradients.freeze()
        header = {
            "kind": "bundle",
            "round": made,
            "worker": self._me.worker,
            "contributions": [one.to_json() for one in contributions],
        }
        self.mailbox.put(made, self._me.worker, (contributions, sums))
        for member in members:
            if member.worker != self._me.worker:
                self._peers.send(member.address, header, sums)
        bundles = self.mailbox.wait(made, members, EXCHANGE_SECONDS + self._slack * len(members))
        if bundles is None:
            self.wanted.set()
            return
        parts = [(member.worker, *bundles[member.worker]) for member in members if bundles[member.worker][0]]
        if not parts:
            return
        update = Update(
            self._stage, self.version, tuple(name for name, _, _ in parts), tuple(tuple(found) for _, found, _ in parts)
        )
        total = [t.clone() for t in parts[0][2]]
        for _, _, part in parts[1:]:
            for a, b in zip(total, part, strict=True):
                a.add_(b)
        self.version = update.name
        if contributions:
            self._gradients.taken()
        self._host.apply(update, total)
        self._host.report({"kind": "update", "update": update.to_json()})
        if self._gradients.waiting:
            self.want()
