"""The events of a simulated swarm: computations, messages, rounds, deaths and joins, one after another."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from nesterov_pp.planning.layers import StageCost
from nesterov_pp.planning.simulate import Network
from nesterov_pp.swarm.quorum import DEAD_AFTER
from nesterov_pp.swarm.scheduler import GRACE

TICK_SECONDS = 0.02
"""The coordinator sends new microbatches so often."""
ROUND_SECONDS = 0.003
"""Seconds in which workers agree on a round, as measured over loopback; latencies and transfers come on top."""
_BACKWARD, _FORWARD = 0, 1


@dataclass(eq=False)
class _Worker:
    """``held`` has the versions of forwards, ``waiting`` gradients that no update contains yet, with theirs.

    ``job`` is the present computation, and ``redo`` has the microbatches whose forward is to run again after a death,
    and whether their gradients are here.
    """

    stage: int
    place: int
    slowness: float
    ready: bool = True
    life: int = 0
    busy: bool = False
    free: float = 0.0
    link_free: float = 0.0
    bundles_until: float = 0.0
    version: int = 0
    load: int = 0
    jobs: list[tuple[int, int, int]] = field(default_factory=list)
    job: tuple[int, int, int] | None = None
    redo: dict[int, bool] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    waiting: list[tuple[int, int]] = field(default_factory=list)
    through: set[int] = field(default_factory=set)


@dataclass(eq=False)
class _Team:
    """A stage. ``round`` names the present round, ``since`` has the microbatches counted since the checkpoint."""

    workers: list[_Worker]
    weights: list[float]
    ready: int
    version: int = 0
    round: int = 0
    in_round: bool = False
    joining: int = 0
    quorum_after: float = 0.0
    since: list[int] = field(default_factory=list)
    delays: int = 0
    gradients: int = 0
    largest: int = 0


class Run:
    """The state of a run at ``now``. ``got`` says, bit by bit, which stages have a microbatch's gradient."""

    def __init__(
        self,
        costs: Sequence[StageCost],
        speeds: Sequence[Sequence[float]],
        network: Network,
        failure: float,
        rejoin: float,
        states: Sequence[float],
        in_flight: float,
        checkpoint_every: int,
        variation: float,
        seed: int,
    ) -> None:
        self.costs, self.network, self.last, self.all = costs, network, len(costs) - 1, (1 << len(costs)) - 1
        self.mean_life, self.rejoin, self.states = failure, rejoin, states
        self.in_flight, self.checkpoint_every = in_flight, checkpoint_every
        self.wiring, self.fate = random.Random(f"{seed}/wiring"), random.Random(f"{seed}/fate")
        self.spread, self.times = math.sqrt(math.log1p(variation**2)), random.Random(f"{seed}/times")
        self.now, self.done, self.again, self.taken_over, self.failures = 0.0, 0, 0, 0, 0
        self.empty, self.empty_since, self.without = 0, 0.0, 0.0
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order, self._number, self._filling = count(), count(), False
        self.got: list[int] = []
        self.attempts: dict[int, tuple[int, list[_Worker]]] = {}
        self.todo: set[int] = set()
        self.due: list[tuple[float, int]] = []
        self.teams = []
        for s, team in enumerate(speeds):
            workers = [_Worker(s, place, 1.0 / speed) for place, speed in enumerate(team)]
            self.teams.append(_Team(workers, [1.0] * len(workers), len(workers)))
            for worker in workers:
                self._weigh(worker)
                self._doom(worker)
        self._fill()

    def step(self, until: float) -> bool:
        """Have the next event happen; return False if there is none until then."""
        if not self.events or self.events[0][0] > until:
            return False
        self.now, _, act, arguments = heapq.heappop(self.events)
        act(*arguments)
        return True

    @property
    def without_worker(self) -> float:
        """The seconds in which some stage had no worker."""
        return self.without + (self.now - self.empty_since if self.empty else 0.0)

    def _at(self, when: float, act: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self.events, (when, next(self._order), act, arguments))

    # ------------------------------------------------------------------ microbatches

    def _fill_soon(self) -> None:
        if not self._filling:
            self._filling = True
            self._at((math.floor(self.now / TICK_SECONDS) + 1) * TICK_SECONDS, self._fill)

    def _fill(self) -> None:
        """Begin attempts, those of microbatches that failed first."""
        self._filling = False
        most = max(1, round(self.in_flight * sum(team.ready for team in self.teams)))
        while not self.empty and len(self.attempts) < most:
            if self.due and self.due[0][0] <= self.now:
                m = heapq.heappop(self.due)[1]
                self.todo.discard(m)
                if self.got[m] == self.all:  # it was on its way back only
                    self.done += 1
                    continue
                self.again += 1
            else:
                m = len(self.got)
                self.got.append(0)
            route = [self.wiring.choices(team.workers, team.weights)[0] for team in self.teams]
            number = next(self._number)
            self.attempts[m] = number, route
            for worker in route:
                worker.through.add(m)
                self._loaded(worker, 1)
            self._at(self.now + self.network.latency, self._arrive, route[0], _FORWARD, m, number)

    def _loaded(self, worker: _Worker, more: int) -> None:
        worker.load += more
        self._weigh(worker)

    def _weigh(self, worker: _Worker) -> None:
        """Set the weight with which a worker is drawn: the inverse square of the time until it would be done."""
        weight = ((1 + worker.load) * worker.slowness) ** -2 if worker.ready else 0.0
        self.teams[worker.stage].weights[worker.place] = weight

    def _end(self, m: int) -> None:
        for worker in self.attempts.pop(m)[1]:
            worker.through.discard(m)
            self._loaded(worker, -1)
        self._fill_soon()

    def _send_again(self, m: int) -> None:
        if m not in self.todo:
            self.todo.add(m)
            heapq.heappush(self.due, (self.now + GRACE, m))
            self._at(self.now + GRACE, self._fill_soon)

    def _current(self, m: int, number: int) -> bool:
        return m in self.attempts and self.attempts[m][0] == number

    def _arrive(self, worker: _Worker, kind: int, m: int, number: int) -> None:
        if not self._current(m, number):
            return
        worker = self.attempts[m][1][worker.stage]  # which may have taken over
        if kind == _BACKWARD and m in worker.redo:
            worker.redo[m] = True
            return
        heapq.heappush(worker.jobs, (kind, m, number))
        if not worker.busy:
            self._work(worker)

    def _work(self, worker: _Worker) -> None:
        """Begin the next computation of a worker that is free: backwards first, and after all steps so far."""
        while worker.jobs and not self._current(*worker.jobs[0][1:]):
            heapq.heappop(worker.jobs)
        cost, behind = self.costs[worker.stage], self.teams[worker.stage].version - worker.version
        begin = max(self.now, worker.free) + behind * cost.step * worker.slowness
        worker.version += behind
        worker.free, worker.busy = begin, bool(worker.jobs)
        if not worker.busy:
            return
        worker.job = kind, m, number = heapq.heappop(worker.jobs)
        seconds = self._drawn(cost.backward if kind == _BACKWARD else cost.forward)
        if kind == _FORWARD:
            worker.held[m] = worker.version
            seconds += self._drawn(cost.backward) if worker.stage == self.last else 0.0
        worker.free = begin + seconds * worker.slowness
        self._at(worker.free, self._computed, worker, worker.life, kind, m, number)

    def _drawn(self, mean: float) -> float:
        """Return the time of one forward or backward."""
        return mean * self.times.lognormvariate(-(self.spread**2) / 2, self.spread) if self.spread else mean

    def _computed(self, worker: _Worker, life: int, kind: int, m: int, number: int) -> None:
        if worker.life != life:
            return
        s, worker.job = worker.stage, None
        if not self._current(m, number):
            worker.held.pop(m, None)
        elif kind == _FORWARD and m in worker.redo:
            if worker.redo.pop(m):
                heapq.heappush(worker.jobs, (_BACKWARD, m, number))
        elif kind == _FORWARD and s < self.last:
            self._send(worker, s + 1, self.costs[s].message_bytes, _FORWARD, m, number)
        else:
            version = worker.held.pop(m)
            if not self.got[m] >> s & 1:
                self.got[m] |= 1 << s
                worker.waiting.append((m, version))
                self._want(self.teams[s])
            if s:
                self._send(worker, s - 1, self.costs[s - 1].message_bytes, _BACKWARD, m, number)
            else:
                self._at(self.now + self.network.latency, self._came_back, m, number)
        self._work(worker)

    def _send(self, worker: _Worker, to: int, size: float, kind: int, m: int, number: int) -> None:
        begin, rate = max(self.now, worker.link_free), self.network.bandwidth
        seconds, beside = size / rate, worker.bundles_until - begin
        if beside > 0:
            streams = self.teams[worker.stage].ready
            seconds = min(seconds * streams, seconds + beside * (1 - 1 / streams))
        worker.link_free = begin + seconds
        target = self.attempts[m][1][to]
        self._at(worker.link_free + self.network.latency, self._arrive, target, kind, m, number)

    def _came_back(self, m: int, number: int) -> None:
        if self._current(m, number):
            self._end(m)
            if self.got[m] == self.all:
                self.done += 1
            else:
                self._send_again(m)

    # ------------------------------------------------------------------ updates

    def _want(self, team: _Team) -> None:
        if team.in_round or team.joining or not any(w.waiting for w in team.workers):
            return
        team.in_round = True
        when = max(self.now + ROUND_SECONDS, team.quorum_after) + 2 * self.network.latency
        self._at(when, self._exchange, team, team.round)

    def _exchange(self, team: _Team, name: int) -> None:
        if team.round != name:
            return
        others = team.ready - 1
        s = team.workers[0].stage
        until = self.now + others * self.costs[s].weight_bytes / self.network.bandwidth
        bundles = [(w, len(w.waiting)) for w in team.workers if w.waiting]
        for worker, _ in bundles:
            worker.bundles_until = until
        self._at(until + (self.network.latency if others else 0.0), self._update, team, name, bundles)

    def _update(self, team: _Team, name: int, bundles: list[tuple[_Worker, int]]) -> None:
        if team.round != name:
            return
        for worker, length in bundles:
            for m, version in worker.waiting[:length]:
                delay = team.version - version
                team.delays, team.gradients = team.delays + delay, team.gradients + 1
                team.largest = max(team.largest, delay)
                team.since.append(m)
            del worker.waiting[:length]
        team.version += 1
        if team.version % self.checkpoint_every == 0:
            team.since = []
        for worker in team.workers:
            if worker.ready and not worker.busy:
                self._work(worker)
        self._no_round(team)
        self._want(team)

    def _no_round(self, team: _Team) -> None:
        team.round, team.in_round = team.round + 1, False

    # ------------------------------------------------------------------ workers come and go

    def _doom(self, worker: _Worker) -> None:
        if self.mean_life < math.inf:
            self._at(self.now + self.fate.expovariate(1.0 / self.mean_life), self._die, worker)

    def _die(self, worker: _Worker) -> None:
        team = self.teams[worker.stage]
        self.failures += 1
        worker.ready, worker.busy, worker.life = False, False, worker.life + 1
        team.ready -= 1
        lost = [m for m, _ in worker.waiting]
        if not team.ready:
            lost, team.since = lost + team.since, []
            if not self.empty:
                self.empty_since = self.now
            self.empty += 1
        for m in sorted(worker.through):
            if not team.ready or m in worker.redo:
                self._end(m)
                self._send_again(m)
            else:
                self._take_over(worker, m)
        for m in lost:
            if self.got[m] == self.all and m not in self.attempts and m not in self.todo:
                self.done -= 1
            self.got[m] &= ~(1 << worker.stage)
            if m not in self.attempts:
                self._send_again(m)
        worker.waiting, worker.jobs, worker.job, worker.held, worker.redo = [], [], None, {}, {}
        self._weigh(worker)
        team.quorum_after = self.now + DEAD_AFTER
        self._no_round(team)
        self._want(team)
        self._at(self.now + self.rejoin, self._join, worker)

    def _take_over(self, worker: _Worker, m: int) -> None:
        """Have a peer finish a microbatch of a worker that has died."""
        number, route = self.attempts[m]
        s, team = worker.stage, self.teams[worker.stage]
        here = {kind for kind, *key in [*worker.jobs, worker.job or (None, -1, -1)] if key == [m, number]}
        if self.got[m] >> s & 1 and not here and m not in worker.held:
            return  # its backward was done
        self._weigh(worker)
        peer = self.wiring.choices(team.workers, team.weights)[0]
        route[s] = peer
        for one, more in ((worker, -1), (peer, 1)):
            self._loaded(one, more)
        worker.through.discard(m)
        peer.through.add(m)
        self.taken_over += 1
        forward_done = m in worker.held and _FORWARD not in here
        if forward_done:
            peer.redo[m] = _BACKWARD in here
        if forward_done or _FORWARD in here:
            after = 3 * self.network.latency + (self.costs[s - 1].message_bytes / self.network.bandwidth if s else 0.0)
            self._at(self.now + after, self._arrive, peer, _FORWARD, m, number)

    def _join(self, worker: _Worker) -> None:
        """Have a worker take over the stage's state; there is no update meanwhile."""
        team = self.teams[worker.stage]
        team.joining += 1
        self._no_round(team)
        seconds = 2 * self.network.latency + self.states[worker.stage] / self.network.bandwidth
        self._at(self.now + seconds, self._joined, worker)

    def _joined(self, worker: _Worker) -> None:
        team = self.teams[worker.stage]
        team.joining -= 1
        if not team.ready:
            self.empty -= 1
            if not self.empty:
                self.without += self.now - self.empty_since
        team.ready += 1
        worker.ready, worker.version = True, team.version
        worker.free = worker.link_free = self.now
        worker.bundles_until = 0.0
        self._weigh(worker)
        self._doom(worker)
        self._fill_soon()
        self._want(team)
