"""Workers that die at any moment, with the scheduler and the workers' own code in one process, without sockets.

Every computation and message is driven in a random order. What a peer takes over must be what the trace says.
"""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from swarm_task import task

from nesterov_pp.pipeline import Trace, VirtualPipeline
from nesterov_pp.swarm.attempts import Action, Replace, Start
from nesterov_pp.swarm.attempts import Worker as Known
from nesterov_pp.swarm.computer import Computer
from nesterov_pp.swarm.core import StageCore
from nesterov_pp.swarm.jobs import Job
from nesterov_pp.swarm.lineage import Contribution, Update
from nesterov_pp.swarm.messages import Header, Message
from nesterov_pp.swarm.protocol import checked
from nesterov_pp.swarm.replay import replay
from nesterov_pp.swarm.scheduler import Scheduler
from nesterov_pp.swarm.task import Task
from nesterov_pp.swarm.worker import Worker


class _Played(Worker):
    """A worker whose messages go to a list, and which computes one thing when told to."""

    def __init__(self, what: Task, stage: int, name: str, swarm: _Swarm) -> None:
        super().__init__("127.0.0.1:1", b"a secret of this test", lambda _: what)
        self.name, self.swarm, self._task, self._stage, self._built = name, swarm, what, stage, True
        self._rounds = cast(Any, SimpleNamespace(close=lambda: None))
        self.core = StageCore(what, stage)
        self._computer = Computer(self.core, self._jobs, self._gradients, self.send, self.report, lambda: None, 1.0)

    def send(self, address: str, header: Header, tensors: Any = ()) -> None:
        self.swarm.messages.setdefault((self.name, address), []).append(Message(header, list(tensors)))

    def report(self, header: Header, tensors: Any = ()) -> None:
        self.swarm.messages.setdefault((self.name, ""), []).append(Message(header, []))

    def act(self) -> bool:
        job = self._jobs.next(0.0)
        if isinstance(job, Job):
            self._computer._do(job)
        elif job is not None:
            job()
        return job is not None


class _Swarm:
    def __init__(self, what: Task, team: int, total: int, seed: int) -> None:
        self.task, self.random = what, random.Random(seed)
        self.scheduler = Scheduler(what.stages, total, seed=seed)
        self.messages: dict[tuple[str, str], list[Message]] = {}
        self.workers: dict[str, _Played] = {}
        self.updates: list[Update] = []
        self.adopted: list[Header] = []
        self.now = 0.0
        for stage in range(what.stages):
            for k in range(team):
                name = f"s{stage}w{k}"
                self.workers[name] = _Played(what, stage, name, self)
                self.scheduler.joined(Known(name, stage, f"{name}:1"))
                self.scheduler.ready(name, self.workers[name].core.version)

    def kill(self, name: str) -> None:
        """A worker dies; some of what it has sent has left it, the rest has not."""
        for (sender, _), messages in self.messages.items():
            if sender == name:
                del messages[self.random.randint(0, len(messages)) :]
        self.workers.pop(name)._close()
        self.take(self.scheduler.died(name, self.now))

    def take(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Start | Replace):
                attempt = action.attempt
                header = {"m": attempt.microbatch, "a": attempt.number, "count": list(attempt.count)}
                header["route"] = [[worker.name, worker.address] for worker in attempt.route]
                to, kind = attempt.route[0].name, "start"
                if isinstance(action, Replace):
                    header["stage"], last = action.stage, action.stage == self.task.stages - 1
                    to, kind = attempt.route[action.stage + (not last)].name, "adopt" if last else "replace"
                    header |= {"f": []} if last else {}
            else:
                header = {"m": action.microbatch, "a": action.attempt}
                to, kind = action.worker, "cancel"
            if to in self.workers:
                self.messages.setdefault(("", f"{to}:1"), []).append(Message({**header, "kind": kind}, []))

    def deliver(self) -> bool:
        """Deliver a message. What goes to the dead is lost, and who sent it may notice."""
        waiting = sorted(way for way, messages in self.messages.items() if messages)
        if not waiting:
            return False
        sender, to = self.random.choice(waiting)
        message = self.messages[sender, to].pop(0)
        checked(message, message.header["kind"])
        if not to:
            self.coordinator(sender, message.header)
        elif (worker := self.workers.get(to.removesuffix(":1"))) is None:
            if sender in self.workers and self.random.random() < 0.5:
                self.workers[sender]._not_sent(to, message.header, "nobody is there")
        elif sender:
            worker._from_peer(cast(Any, None), message)
        else:
            worker._obey(message)
        return True

    def coordinator(self, name: str, header: Header) -> None:
        scheduler, m, a = self.scheduler, header["m"], header["a"]
        match header["kind"]:
            case "done":
                scheduler.done(m, a, self.now)
            case "cancelled":
                scheduler.cancelled(name, m, a, header["counted"])
            case "failed":
                self.take(scheduler.failed(m, a, self.now, header["to"]))
            case "adopted":
                if scheduler.adopted(m, a, self.now) is not None:
                    self.adopted.append(header)
            case "beyond":
                self.take(scheduler.beyond(m, a, self.now))

    def update(self, stage: int) -> None:
        team = sorted((w for w in self.workers.values() if w._stage == stage), key=lambda w: w.name)
        found = [(worker, *worker._gradients.freeze()) for worker in team]
        parts = [(w.name, contributions, sums) for w, contributions, sums in found if contributions]
        if not parts:
            return
        names, bundles, sums = zip(*parts, strict=True)
        update = Update(stage, team[0].core.version, names, tuple(map(tuple, bundles)))
        total = [t.clone() for t in sums[0]]
        for part in sums[1:]:
            for a, b in zip(total, part, strict=True):
                a.add_(b)
        for worker in team:
            worker._gradients.taken()
            worker.core.apply(update, [t.clone() for t in total])
        self.updates.append(update)
        assert self.scheduler.updated(update)

    def run(self, deaths: int, most: int = 40_000) -> None:
        for _ in range(most):
            self.now += 0.001
            if self.random.random() < 0.05:
                self.take(self.scheduler.tick(self.now))
            if self.random.random() < 0.5:
                self.deliver()
            elif self.workers:
                self.workers[self.random.choice(sorted(self.workers))].act()
            if self.random.random() < 0.04:
                self.update(self.random.randrange(self.task.stages))
            if deaths and self.random.random() < 0.01:
                stage = self.random.randrange(self.task.stages)
                team = [name for name, worker in self.workers.items() if worker._stage == stage]
                if len(team) > 1:
                    self.kill(self.random.choice(team))
                    deaths -= 1
            if self.scheduler.finished:
                return
            if not any(self.messages.values()) and not self.scheduler.attempts:
                self.now += 1.0
        raise AssertionError("the run does not end")

    def close(self) -> None:
        for worker in self.workers.values():
            worker._close()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["swarm", "nesterov"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_whatever_dies_whenever_the_trace_is_true_and_nothing_is_lost(method: str, stages: int) -> None:
    taken = exact = 0
    for seed in range(3):
        what = replace(task(method, stages), versions=8)
        swarm = _Swarm(what, 5, 60, seed)
        try:
            swarm.run(deaths=3 * stages)
            found = replay(what, swarm.updates, [line.head for line in swarm.scheduler.lines])
            for worker in swarm.workers.values():
                weights = found.weights[worker._stage]
                assert all(torch.equal(p, weights[n]) for n, p in worker.core.stash.weights().items())
        finally:
            swarm.close()
        assert found.unlike == []
        assert all(set(line.counted) == set(range(60)) for line in swarm.scheduler.lines)
        taken += swarm.scheduler.taken_over
        exact += sum(header["version"] == header["before"] for header in swarm.adopted)
    assert taken > 3
    if method == "nesterov" and stages > 1:
        assert exact > 0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["nesterov", "nesterov-rotated"])
def test_a_forward_that_a_peer_runs_again_at_its_version_changes_nothing(method: str) -> None:
    """Stage 0 is a microbatch ahead, and its worker dies before every third backward: as without deaths, to the bit."""
    what, run = task(method, 2), 20
    pipe = VirtualPipeline(
        [what.build(s) for s in range(2)],
        what.loss_fn,
        method=what.recipe,
        lr=what.rate(0),
        delays=Trace([[min(m, 1), 0] for m in range(run)]),
        seed=what.seed,
    )
    first, peer, last = StageCore(what, 0), StageCore(what, 0), StageCore(what, 1)
    outputs = {0: first.forward(0, 0, what.batch(0)[0])}
    for m in range(run):
        pipe.lr = what.rate(m)
        expected = float(pipe.step(*what.batch(m)))
        outputs[m + 1] = first.forward(m + 1, m + 1, what.batch(m + 1)[0])
        output, version = outputs.pop(m)
        behind = last.forward(m, m, output)[1]
        assert float(last.loss(m, what.batch(m)[1])) == expected
        found = last.backward(m, None)
        at = (found.graph, found.at)
        worker = first
        if m % 3 == 0:
            worker = peer
            again, same = peer.forward(m, m, what.batch(m)[0], version)
            assert (same, torch.equal(again, output)) == (version, True)
        earlier = worker.backward(m, found.of_input)
        assert earlier.graph == version
        one = Contribution(m, (version, behind), ((earlier.graph, earlier.at), at), expected.hex())
        update = Update(0, first.version, ("w",), ((one,),))
        for core in (first, peer):
            core.apply(update, [g.clone() for g in earlier.of_weights])
        one = replace(one, backward=(at,))
        last.apply(Update(1, last.version, ("w",), ((one,),)), found.of_weights)
    for stash, core in zip(pipe.stashes, (peer, last), strict=True):
        for name, p in stash.weights().items():
            assert torch.equal(p, core.stash.weights()[name])


def test_a_version_that_is_not_in_the_ring_is_replaced_by_the_newest() -> None:
    core = StageCore(task("nesterov", 2), 0)
    other = "0:0123456789abcdef"  # of the same number, but another
    assert core.forward(0, 0, core.task.batch(0)[0], other)[1] == core.version
