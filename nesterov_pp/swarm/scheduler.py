"""Which microbatch goes where: the decisions of the coordinator, without sockets, clocks or threads.

[note: what is kept when a worker dies]
A microbatch is settled on a stage when an update of the stage's present line of versions contains its gradient. Until
then it is on its way (an ``Attempt``) or its gradient waits on a worker for the next update. When a worker dies, what
was on it is gone. Microbatches on their way through it are taken over by a peer, which takes its place on their route
(``takeover``); if that fails, or there is no peer, they are called back everywhere. Gradients that waited on it are
missed. A microbatch that was called back or is missed is sent again from the start, along living workers; the stages
that have its gradient already only pass it on. So a gradient is lost only if microbatches that failed are to be
dropped. It can be counted twice on a stage if a worker dies between an update and the news of it; the ``GRACE`` before
a microbatch is sent again makes this rare, and the trace shows it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from nesterov_pp.swarm.attempts import Action, Attempt, Cancel, Line, Replace, Start, Worker
from nesterov_pp.swarm.lineage import Update

GRACE = 1.5
"""Seconds between a death and the next attempt, in which the survivors report updates that contain its gradients."""

PATIENCE, USUAL_TIMES = 30.0, 10.0
"""An attempt that takes longer than these seconds and this many times as long as usual is called back."""

TAKEOVER_SECONDS, DOUBT_SECONDS = 10.0, 1.0
"""Called back is also what a peer has not taken over within so long, and twice as long as usual; and what could not be
sent to a worker that has not died within so long."""


class Scheduler:
    """The state of a run's microbatches 0 ... ``total - 1``.

    Args:
        stages: number of stages.
        total: number of microbatches.
        per_worker: microbatches in flight for each living worker.
        seed: of the wiring.
        resend: whether a microbatch that failed is sent again; otherwise its missing gradients are counted as lost.
    """

    def __init__(self, stages: int, total: int, *, per_worker: float = 2.0, seed: int = 0, resend: bool = True) -> None:
        self.stages, self.total, self.per_worker, self.seed, self.resend = stages, total, per_worker, seed, resend
        self.workers: dict[str, Worker] = {}
        self.lines = [Line() for _ in range(stages)]
        self.attempts: dict[int, Attempt] = {}
        self.lost: set[tuple[int, int]] = set()
        self.again = self.taken_over = 0
        self._next = self._first = 0
        self._usual = 0.0
        self._tries: Counter[int] = Counter()
        self._todo: dict[int, float] = {}
        self._waiting: dict[tuple[int, int], str] = {}
        self._missed: dict[tuple[int, int], float] = {}
        self._load: Counter[str] = Counter()

    # ------------------------------------------------------------------ what happens

    def joined(self, worker: Worker, waiting: Sequence[int] = ()) -> None:
        """A worker has come, or come back to a coordinator that was away, with gradients of ``waiting``."""
        self.workers[worker.name] = worker
        for m in waiting:
            self._wait(m, worker.stage, worker.name)

    def ready(self, name: str, version: str) -> None:
        """A worker has the weights of a version of its stage."""
        worker = self.workers.get(name)
        if worker is None:
            return
        alone = not any(w.ready for w in self._team(worker.stage))
        worker.ready = True
        line = self.lines[worker.stage]
        if alone and line.head != version:
            line.go_on_from(version)
            self._settle_all()

    def died(self, name: str, now: float) -> list[Action]:
        """A worker is gone, with everything on it."""
        if self.workers.pop(name, None) is None:
            return []
        self._miss([key for key, worker in self._waiting.items() if worker == name], now)
        actions: list[Action] = []
        for attempt in list(self.attempts.values()):
            stage = next((s for s, worker in enumerate(attempt.route) if worker.name == name), None)
            if stage is None:
                continue
            if attempt.recalled is None and attempt.taken is None and stage not in self.waits_for:
                actions.append(self._replace(attempt, stage, now))
                continue
            actions += self._recall(attempt, now + GRACE)
            assert attempt.recalled is not None
            attempt.recalled.discard(name)
            self._end_if_dropped(attempt)
        return actions

    def adopted(self, microbatch: int, number: int, now: float = 0.0) -> Attempt | None:
        """A peer has finished the backward of what it took over; return the attempt if it is still on its way."""
        attempt = self._attempt(microbatch, number)
        if attempt is None or attempt.recalled is not None or attempt.taken is None:
            return None
        attempt.taken = None
        self.taken_over += 1
        if attempt.returned:
            self._came_back(attempt, now)
        return attempt

    def beyond(self, microbatch: int, number: int, now: float) -> list[Action]:
        """There was nothing to take over: the dead worker's backward was done, and an update may have its gradient."""
        attempt = self._attempt(microbatch, number)
        if attempt is None or attempt.recalled is not None or attempt.taken is None:
            return []
        stage, attempt.taken = attempt.taken, None
        if attempt.count[stage]:
            attempt.count[stage] = False
            if microbatch not in self.lines[stage].counted:
                self._missed[microbatch, stage] = now + GRACE
        if attempt.returned:
            self._came_back(attempt, now)
        return [Cancel(attempt.route[stage].name, microbatch, number)]

    def done(self, microbatch: int, number: int, now: float = 0.0) -> None:
        """An attempt has come back to the first stage: its gradients are settled, or wait for the next updates."""
        attempt = self._attempt(microbatch, number)
        if attempt is None or attempt.recalled is not None:
            return
        if attempt.taken is not None:
            attempt.returned = True
            return
        self._came_back(attempt, now)

    def _came_back(self, attempt: Attempt, now: float) -> None:
        self._usual += 0.1 * (now - attempt.begun - self._usual)
        self._end(attempt)
        for s, (worker, counts) in enumerate(zip(attempt.route, attempt.count, strict=True)):
            if counts:
                self._wait(attempt.microbatch, s, worker.name)
        self._settle(attempt.microbatch)

    def failed(self, microbatch: int, number: int, now: float, to: str | None = None) -> list[Action]:
        """An attempt could not go on. ``to``: the address of a worker that could not be reached, and may have died."""
        attempt = self._attempt(microbatch, number)
        if attempt is None:
            return []
        if to is not None and attempt.recalled is None:
            if attempt.doubt is None and to in {worker.address for worker in attempt.route}:
                attempt.doubt = now
            return []
        return self._recall(attempt, now + GRACE)

    def cancelled(self, name: str, microbatch: int, number: int, counted: bool) -> None:
        """A worker has dropped an attempt; ``counted``: it has the gradient of its stage already."""
        attempt = self._attempt(microbatch, number)
        if attempt is None or attempt.recalled is None:
            return
        attempt.recalled.discard(name)
        if counted:
            self._wait(microbatch, next(w.stage for w in attempt.route if w.name == name), name)
        self._end_if_dropped(attempt)

    def dropped(self, name: str, microbatches: Sequence[int], now: float) -> list[Action]:
        """A worker lives, but had to take over the weights of another, and has dropped everything else."""
        worker = self.workers.get(name)
        if worker is None:
            return []
        self._miss([(m, worker.stage) for m in microbatches if (m, worker.stage) in self._waiting], now)
        through = [a for a in self.attempts.values() if any(w.name == name for w in a.route)]
        return [action for attempt in through for action in self._recall(attempt, now + GRACE)]

    def updated(self, update: Update) -> bool:
        """A stage has made an update; returns whether that is news."""
        line = self.lines[update.stage]
        follows = update.parent == line.head
        if not line.add(update):
            return False
        for one in update.contributions:
            self._waiting.pop((one.microbatch, update.stage), None)
            self._missed.pop((one.microbatch, update.stage), None)
            self._settle(one.microbatch)
        if not follows:
            self._settle_all()
        return True

    def went_on(self, updates: Sequence[Update], now: float, generation: int) -> None:
        """Take the updates of a run that earlier coordinators have begun; what was on its way is sent again.

        ``generation`` counts them. Attempts are numbered so that they differ from theirs.
        """
        self._first = generation << 20
        for update in updates:
            self.lines[update.stage].add(update)
        begun = {m for line in self.lines for m in line.counted}
        self._next = max(begun, default=-1) + 1
        # Gradients may wait on workers that have not come back yet.
        for m in range(self._next):
            for s in range(self.stages):
                if m not in self.lines[s].counted:
                    self._missed[m, s] = now + 10 * GRACE

    # ------------------------------------------------------------------ what to do

    def tick(self, now: float) -> list[Action]:
        """Return what is to be sent now."""
        for key in [key for key, until in self._missed.items() if until <= now]:
            del self._missed[key]
            self._settle(key[0])
        actions: list[Action] = []
        patience = max(PATIENCE, USUAL_TIMES * self._usual)
        for a in [a for a in self.attempts.values() if a.recalled is None]:
            unsent = a.doubt is not None and now - a.doubt > DOUBT_SECONDS
            untaken = a.taken is not None and now - a.taken_since > max(TAKEOVER_SECONDS, 2 * self._usual)
            if unsent or untaken or now - a.begun > patience:
                actions += self._recall(a, now + GRACE * (unsent or untaken))
        while not self.waits_for and len(self.attempts) < self.in_flight:
            again = next((m for m, after in self._todo.items() if after <= now), None)
            if again is not None:
                del self._todo[again]
                m = again
            elif self._next < self.total:
                m, self._next = self._next, self._next + 1
            else:
                break
            if (attempt := self._begin(m, now)) is not None:
                self.again += again is not None
                actions.append(Start(attempt))
        return actions

    def silent(self, now: float) -> set[str]:
        """Return the workers that do not answer: they have not dropped what was called back long ago."""
        patience = max(PATIENCE, USUAL_TIMES * self._usual)
        recalled = [a for a in self.attempts.values() if a.recalled and now - a.since > patience]
        return {name for attempt in recalled for name in attempt.recalled or ()}

    @property
    def in_flight(self) -> int:
        """How many microbatches may be on their way."""
        return max(1, round(self.per_worker * sum(w.ready for w in self.workers.values())))

    @property
    def waits_for(self) -> list[int]:
        """The stages that have no worker."""
        return [s for s in range(self.stages) if not any(w.ready for w in self._team(s))]

    @property
    def settled(self) -> int:
        """How many microbatches have been counted on every stage, or counted as lost."""
        return sum(1 for m in range(self._next) if not self._open(m))

    @property
    def finished(self) -> bool:
        if self._next < self.total or self.attempts or self._todo or self._waiting or self._missed:
            return False
        return self.settled == self.total

    @property
    def twice(self) -> int:
        """How many gradients are counted more than once."""
        return sum(n - 1 for line in self.lines for n in line.counted.values())

    # ------------------------------------------------------------------ inside

    def _team(self, stage: int) -> list[Worker]:
        return [w for w in self.workers.values() if w.stage == stage]

    def _attempt(self, microbatch: int, number: int) -> Attempt | None:
        attempt = self.attempts.get(microbatch)
        return attempt if attempt is not None and attempt.number == number else None

    def _open(self, m: int) -> list[int]:
        """Return the stages that still have to count a microbatch."""
        return [s for s, line in enumerate(self.lines) if m not in line.counted and (m, s) not in self.lost]

    def _needed(self, m: int) -> list[int]:
        known = (self._waiting, self._missed)
        return [s for s in self._open(m) if not any((m, s) in table for table in known)]

    def _begin(self, m: int, now: float) -> Attempt | None:
        needed = self._needed(m)
        if not needed:
            return None
        number = self._first + self._tries[m]
        self._tries[m] += 1
        draw = random.Random(f"{self.seed}/{m}/{number}")
        route = [self._pick(s, draw) for s in range(self.stages)]
        self._load.update(worker.name for worker in route)
        attempt = Attempt(m, number, route, [s in needed for s in range(self.stages)], now)
        self.attempts[m] = attempt
        return attempt

    def _pick(self, stage: int, draw: random.Random) -> Worker:
        """Draw a ready worker, weighted by the inverse square of the time until it would be done."""
        team = sorted((w for w in self._team(stage) if w.ready), key=lambda w: w.name)
        known = [w.seconds for w in team if w.seconds]
        usual = sum(known) / len(known) if known else 1.0
        weights = [((1 + self._load[w.name]) * (w.seconds or usual)) ** -2 for w in team]
        return draw.choices(team, weights)[0]

    def _replace(self, attempt: Attempt, stage: int, now: float) -> Replace:
        """Put a peer in the place of a worker that has died."""
        old = attempt.route[stage]
        peer = self._pick(stage, random.Random(f"{self.seed}/{attempt.microbatch}/{attempt.number}/{old.name}"))
        attempt.route[stage] = peer
        attempt.taken, attempt.before, attempt.taken_since, attempt.doubt = stage, old.name, now, None
        self._load.update([peer.name])
        self._load.subtract([old.name])
        return Replace(attempt, stage)

    def _end(self, attempt: Attempt) -> None:
        del self.attempts[attempt.microbatch]
        self._load.subtract(worker.name for worker in attempt.route)

    def _recall(self, attempt: Attempt, after: float) -> list[Action]:
        attempt.after = max(attempt.after, after)
        if attempt.recalled is not None:
            return []
        attempt.since = after
        attempt.recalled = {w.name for w in attempt.route if w.name in self.workers}
        actions: list[Action] = [Cancel(name, attempt.microbatch, attempt.number) for name in attempt.recalled]
        self._end_if_dropped(attempt)
        return actions

    def _end_if_dropped(self, attempt: Attempt) -> None:
        if attempt.recalled == set() and self.attempts.get(attempt.microbatch) is attempt:
            self._end(attempt)
            self._settle(attempt.microbatch, attempt.after)

    def _wait(self, m: int, stage: int, name: str) -> None:
        if m in self.lines[stage].counted:
            return
        self._missed.pop((m, stage), None)
        if name in self.workers:
            self._waiting[m, stage] = name
        else:
            self._missed[m, stage] = 0.0

    def _miss(self, keys: Sequence[tuple[int, int]], now: float) -> None:
        for key in keys:
            del self._waiting[key]
            self._missed[key] = now + GRACE

    def _settle(self, m: int, after: float = 0.0) -> None:
        """Send a microbatch again, or count it as lost, if something is missing that is not on its way."""
        if m in self.attempts or m >= self._next:
            return
        needed = self._needed(m)
        if not needed:
            self._todo.pop(m, None)
        elif self.resend:
            self._todo[m] = max(after, self._todo.get(m, 0.0))
        else:
            self.lost.update((m, s) for s in needed)

    def _settle_all(self) -> None:
        for m in range(self._next):
            self._settle(m)
