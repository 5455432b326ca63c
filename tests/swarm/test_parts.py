"""The parts of a worker that threads share: bundles, jobs, mailboxes, and rounds over a quorum that is played here."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from nesterov_pp.swarm.gradients import Gradients
from nesterov_pp.swarm.jobs import Job, Jobs
from nesterov_pp.swarm.lineage import ROOT, Contribution, Update
from nesterov_pp.swarm.messages import Message, RefusedError
from nesterov_pp.swarm.quorum import Member, NoQuorumError, Quorum
from nesterov_pp.swarm.rounds import Mailbox, Rounds


def _one(m: int) -> Contribution:
    return Contribution(m, (ROOT, ROOT), ((ROOT, ROOT), (ROOT, ROOT)), "0x0p+0")


def test_a_frozen_bundle_stays_as_it_was_until_it_is_taken() -> None:
    gradients = Gradients()
    assert gradients.freeze() == ([], [])
    gradients.add(_one(0), [torch.ones(2)])
    gradients.add(_one(1), [torch.ones(2)])
    found, sums = gradients.freeze()
    gradients.add(_one(2), [torch.full((2,), 5.0)])
    assert [one.microbatch for one in found] == [0, 1]
    assert gradients.freeze()[1] is sums
    assert sums[0].tolist() == [2.0, 2.0]
    assert gradients.waiting == [0, 1, 2]
    gradients.taken()
    assert gradients.freeze()[1][0].tolist() == [5.0, 5.0]
    assert gradients.drop() == [2]
    assert gradients.waiting == []


def _job(m: int, backward: bool = False) -> Job:
    return Job(m, 0, [], [], [], backward=[] if backward else None)


def test_jobs_come_in_order_and_cancelled_ones_never() -> None:
    jobs, called = Jobs(), []
    for job in (_job(5), _job(3), _job(9, backward=True), _job(7, backward=True)):
        jobs.add(job)
    jobs.call(lambda: called.append(1))
    jobs.cancel((3, 0))
    act = jobs.next(0.0)
    assert callable(act)
    act()
    found = [jobs.next(0.0) for _ in range(4)]
    assert [job.microbatch if isinstance(job, Job) else None for job in found] == [7, 9, 5, None]
    jobs.add(_job(3))
    assert jobs.next(0.0) is None
    jobs.close()
    assert jobs.next(5.0) is None
    assert called == [1]


def test_nobody_waits_for_a_dead_worker() -> None:
    box, members = Mailbox(), [Member("a", "a:1", ROOT), Member("b", "b:1", ROOT)]
    box.put("r", "a", ([], []))
    threading.Timer(0.1, box.gone, ({"b:1"}, {"a:1"})).start()
    begin = time.monotonic()
    assert box.wait("r", members, 10.0) is None
    assert time.monotonic() - begin < 5.0
    box.gone(set(), {"a:1", "b:1"})  # it has come back
    box.put("s", "a", ([], []))
    threading.Timer(0.1, box.put, ("s", "b", ([_one(1)], []))).start()
    found = box.wait("s", members, 10.0)
    assert found is not None
    assert found["b"][0] == [_one(1)]


class _Lighthouse:
    """Plays a quorum of workers in this process: whoever asks waits until all have."""

    def __init__(self, workers: list[str]) -> None:
        self.barrier, self.count = threading.Barrier(len(workers), self.form), 0
        self.members: dict[str, Member] = {}
        self.lock = threading.Lock()

    def form(self) -> None:
        self.count += 1
        self.quorum = Quorum(f"r{self.count}", sorted(self.members.values()))

    def ask(self, member: Member) -> Quorum:
        with self.lock:
            self.members[member.worker] = member
        try:
            self.barrier.wait(1.0)
        except threading.BrokenBarrierError:
            with self.lock:
                if self.barrier.broken:
                    self.barrier.reset()
            raise NoQuorumError("nobody else") from None
        return self.quorum


class _Player:
    """A worker around real rounds; messages to others are delivered at once."""

    def __init__(self, name: str, lighthouse: _Lighthouse, players: dict[str, _Player], version: str = ROOT) -> None:
        self.gradients, self.updates, self.reports = Gradients(), [], []
        self.healed: list[str] = []
        self.name, self.lighthouse, self.players = name, lighthouse, players
        me = Member(name, f"{name}:1", version)
        shapes: Any = [(torch.float32, (2,))]
        self.rounds = Rounds(me, 0, 2, shapes, self, self, self.gradients, self, self.reports.append)  # type: ignore[arg-type]
        players[f"{name}:1"] = self

    def ask(self, version: str, _number: int, _seconds: float) -> Quorum:
        return self.lighthouse.ask(Member(self.name, f"{self.name}:1", version))

    def close(self) -> None: ...

    def send(self, address: str, header: dict[str, Any], tensors: Any = ()) -> None:
        other = self.players[address]
        if header["kind"] == "bundle":
            other.rounds.arrived(Message(header, list(tensors)))
        else:
            other.rounds.wanted.set()

    def apply(self, update: Update, sums: list[Tensor]) -> None:
        self.updates.append((update, sums))

    def behind(self) -> bool:
        return False

    def heal(self, member: Member) -> str:
        self.healed.append(member.worker)
        return member.version

    def report(self, header: dict[str, Any]) -> None:
        self.reports.append(header)


def _until(holds: Any) -> None:
    until = time.monotonic() + 10.0
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_all_members_of_a_round_make_the_same_update() -> None:
    players: dict[str, _Player] = {}
    lighthouse = _Lighthouse(["a", "b", "c"])
    team = [_Player(name, lighthouse, players) for name in "cab"]
    for k, player in enumerate(team[:2]):
        player.gradients.add(_one(k), [torch.tensor([0.1, 1e8]) * (k + 1)])
    for player in team:
        player.rounds.start()
        player.rounds.wanted.set()
    _until(lambda: all(player.updates for player in team))
    for player in team:
        player.rounds.close()
    (first, sums), *others = [player.updates[0] for player in team]
    assert first.workers == ("a", "c")  # in the order of their names; b had no gradient
    assert [one.microbatch for one in first.contributions] == [1, 0]
    for update, own in others:
        assert update.name == first.name
        assert torch.equal(own[0], sums[0])
        assert own[0] is not sums[0]
    assert all(player.rounds.version == first.name for player in team)
    assert all({"kind": "update", "update": first.to_json()} in player.reports for player in team)


def test_whoever_is_behind_takes_over_a_state_and_nobody_updates_meanwhile() -> None:
    newer = Update(0, ROOT, ("a",), ((_one(0),),)).name
    players: dict[str, _Player] = {}
    lighthouse = _Lighthouse(["a", "b"])
    old, new = _Player("a", lighthouse, players, newer), _Player("b", lighthouse, players)
    old.gradients.add(_one(1), [torch.ones(2)])
    for player in (old, new):
        player.rounds.start()
        player.rounds.wanted.set()
    _until(lambda: old.updates and new.updates)
    for player in (old, new):
        player.rounds.close()
    assert new.healed == ["a"]
    assert old.healed == []
    assert old.updates[0][0].parent == new.updates[0][0].parent == newer
    assert {"kind": "ready", "version": newer} in new.reports


def test_bundles_that_are_not_of_this_stage_are_refused() -> None:
    player = _Player("a", _Lighthouse(["a"]), {})
    contributions = [{**_one(0).to_json(), "f": [ROOT, ROOT], "b": [[ROOT, ROOT], [ROOT, ROOT]]}]
    good = {"kind": "bundle", "round": "r", "worker": "b", "contributions": contributions}
    player.rounds.arrived(Message(good, [torch.ones(2)]))
    for tensors in ([], [torch.ones(3)], [torch.ones(2), torch.ones(2)], [torch.ones(2, dtype=torch.float64)]):
        with pytest.raises(RefusedError, match="not gradients of this stage"):
            player.rounds.arrived(Message(good, tensors))
    with pytest.raises(RefusedError, match="malformed"):
        player.rounds.arrived(Message({**good, "contributions": [{"m": 0}]}, [torch.ones(2)]))
