"""The coordinator's decisions: what is kept, sent again, or lost when workers come and go."""

from __future__ import annotations

import random

import pytest

from nesterov_pp.swarm.attempts import Action, Attempt, Cancel, Replace, Start, Worker
from nesterov_pp.swarm.lineage import ROOT, Contribution, MalformedError, Update
from nesterov_pp.swarm.scheduler import DOUBT_SECONDS, GRACE, PATIENCE, TAKEOVER_SECONDS, Scheduler


def _scheduler(total: int = 10, *, teams: tuple[int, ...] = (2, 2), resend: bool = True, seed: int = 0) -> Scheduler:
    scheduler = Scheduler(len(teams), total, per_worker=1.0, seed=seed, resend=resend)
    for stage, team in enumerate(teams):
        for k in range(team):
            _join(scheduler, stage, f"s{stage}w{k}")
    return scheduler


def _join(scheduler: Scheduler, stage: int, name: str) -> None:
    scheduler.joined(Worker(name, stage, f"{name}:1"))
    scheduler.ready(name, scheduler.lines[stage].head)


def _update(scheduler: Scheduler, stage: int, microbatches: list[int], parent: str | None = None) -> Update:
    stages = scheduler.stages
    parts = tuple(Contribution(m, (ROOT,) * stages, ((ROOT, ROOT),) * (stages - stage), "0x0p+0") for m in microbatches)
    update = Update(stage, scheduler.lines[stage].head if parent is None else parent, ("w",), (parts,))
    assert scheduler.updated(update)
    return update


def _started(actions: list[Action]) -> list[Attempt]:
    return [action.attempt for action in actions if isinstance(action, Start)]


def test_a_run_without_failures() -> None:
    scheduler = _scheduler(10)
    done = []
    for now in range(100):
        for attempt in _started(scheduler.tick(now)):
            assert attempt.count == [True, True]
            done.append(attempt.microbatch)
            scheduler.done(attempt.microbatch, attempt.number)
            assert not scheduler.finished
            for stage in (1, 0):
                _update(scheduler, stage, [attempt.microbatch])
    assert done == list(range(10))
    assert scheduler.finished
    assert (scheduler.settled, scheduler.again, scheduler.twice, scheduler.lost) == (10, 0, 0, set())


def test_no_more_than_allowed_are_in_flight_and_a_stage_without_workers_waits() -> None:
    scheduler = _scheduler(100)
    assert len(_started(scheduler.tick(0.0))) == scheduler.in_flight == 4
    assert scheduler.tick(0.0) == []
    for action in [*scheduler.died("s1w0", 0.0), *scheduler.died("s1w1", 0.0)]:
        if isinstance(action, Cancel):
            scheduler.cancelled(action.worker, action.microbatch, action.attempt, counted=False)
    assert scheduler.waits_for == [1]
    assert _started(scheduler.tick(100.0)) == []
    _join(scheduler, 1, "s1w2")
    assert _started(scheduler.tick(100.0))


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("order", ["adopted first", "returned first"])
def test_a_peer_takes_over_a_microbatch_on_its_way_through_a_dead_worker(stage: int, order: str) -> None:
    scheduler = _scheduler(1, teams=(3, 3))
    (attempt,) = _started(scheduler.tick(0.0))
    dead = attempt.route[stage].name
    assert scheduler.died(dead, 5.0) == [Replace(attempt, stage)]
    peer = attempt.route[stage]
    assert (peer.stage, peer.name != dead) == (stage, True)
    assert scheduler.tick(5.0) == []
    if order == "returned first":  # the peer's news takes longer than the other stages
        scheduler.done(0, 0)
        assert scheduler.attempts
        assert scheduler.adopted(0, 0) is attempt
    else:
        assert scheduler.adopted(0, 0) is attempt
        scheduler.done(0, 0)
    assert (scheduler.attempts, scheduler.taken_over, scheduler.again) == ({}, 1, 0)
    assert scheduler.died(peer.name, 6.0) == []  # its gradient waited there
    _update(scheduler, 1 - stage, [0])
    (again,) = _started(scheduler.tick(6.0 + GRACE))
    assert again.count == [s == stage for s in range(2)]


def test_what_a_dead_worker_had_finished_is_not_taken_over_but_missed() -> None:
    scheduler = _scheduler(1)
    (attempt,) = _started(scheduler.tick(0.0))
    scheduler.died(attempt.route[1].name, 5.0)
    peer = attempt.route[1].name
    assert scheduler.beyond(0, 0, 5.0) == [Cancel(peer, 0, 0)]
    scheduler.done(0, 0)
    _update(scheduler, 0, [0])
    assert _started(scheduler.tick(5.0)) == []
    (again,) = _started(scheduler.tick(5.0 + GRACE))
    assert again.count == [False, True]


def test_a_takeover_that_fails_is_called_back_and_sent_again() -> None:
    for how in ("a second death", "failed", "too long"):
        scheduler = _scheduler(1, teams=(3, 3))
        (attempt,) = _started(scheduler.tick(0.0))
        scheduler.died(attempt.route[1].name, 1.0)
        first, second = attempt.route
        now = 1.0
        if how == "a second death":
            cancels = scheduler.died(first.name, now)
        elif how == "failed":
            cancels = scheduler.failed(0, 0, now)
        else:
            assert scheduler.tick(now + TAKEOVER_SECONDS) == []
            now += TAKEOVER_SECONDS + 0.1
            cancels = scheduler.tick(now)
        told = {action.worker for action in cancels if isinstance(action, Cancel)}
        assert told == {first.name, second.name} & scheduler.workers.keys()
        for name in told:
            scheduler.cancelled(name, 0, 0, counted=False)
        assert scheduler.adopted(0, 0) is None
        (again,) = _started(scheduler.tick(now + GRACE))
        assert (again.number, again.count, scheduler.taken_over) == (1, [True, True], 0)


def test_what_could_not_be_sent_waits_for_the_news_of_a_death() -> None:
    for dies in (True, False):
        scheduler = _scheduler(1)
        (attempt,) = _started(scheduler.tick(0.0))
        second = attempt.route[1]
        assert scheduler.failed(0, 0, 1.0, to=second.address) == []
        if dies:
            assert scheduler.died(second.name, 1.1) == [Replace(attempt, 1)]
            assert scheduler.failed(0, 0, 1.2, to=second.address) == []  # the same, late
        found = scheduler.tick(1.1 + DOUBT_SECONDS)
        assert {type(action) for action in found} == (set() if dies else {Cancel})


def test_a_microbatch_on_its_way_through_the_last_worker_of_a_stage_is_called_back_and_sent_again() -> None:
    scheduler = _scheduler(1, teams=(2, 1))
    (attempt,) = _started(scheduler.tick(0.0))
    first, second = attempt.route
    assert scheduler.died(second.name, 5.0) == [Cancel(first.name, 0, 0)]
    _join(scheduler, 1, "s1w9")
    assert _started(scheduler.tick(5.0 + GRACE)) == []  # the first has not dropped it yet
    scheduler.cancelled(first.name, 0, 0, counted=False)
    assert _started(scheduler.tick(5.0)) == []
    (again,) = _started(scheduler.tick(5.0 + GRACE))
    assert (again.number, again.count, scheduler.again) == (1, [True, True], 1)
    assert second.name not in {worker.name for worker in again.route}
    scheduler.done(0, 0)  # late news of the attempt that was called back
    assert scheduler.attempts


def test_a_stage_that_has_the_gradient_only_passes_it_on() -> None:
    scheduler = _scheduler(1)
    (attempt,) = _started(scheduler.tick(0.0))
    first, second = attempt.route
    scheduler.failed(0, 0, 0.0)
    scheduler.cancelled(first.name, 0, 0, counted=False)
    scheduler.cancelled(second.name, 0, 0, counted=True)
    (again,) = _started(scheduler.tick(GRACE))
    assert again.count == [True, False]
    scheduler.done(0, 1)
    _update(scheduler, 0, [0])
    assert not scheduler.finished
    _update(scheduler, 1, [0])
    assert scheduler.finished


def test_a_gradient_that_waited_on_a_dead_worker_is_missed_unless_an_update_has_it() -> None:
    for reported in (True, False):
        scheduler = _scheduler(1)
        (attempt,) = _started(scheduler.tick(0.0))
        scheduler.done(0, 0)
        _update(scheduler, 1, [0])
        scheduler.died(attempt.route[0].name, 10.0)
        if reported:
            _update(scheduler, 0, [0])
            assert scheduler.finished
        again = _started(scheduler.tick(10.0 + GRACE))
        assert [a.count for a in again] == ([] if reported else [[True, False]])


def test_dropped_instead_of_sent_again() -> None:
    scheduler = _scheduler(1, resend=False)
    (attempt,) = _started(scheduler.tick(0.0))
    scheduler.done(0, 0)
    _update(scheduler, 1, [0])
    scheduler.died(attempt.route[0].name, 0.0)
    assert scheduler.tick(GRACE) == []
    assert scheduler.lost == {(0, 0)}
    assert scheduler.finished


def test_a_line_that_ended_gives_its_gradients_back() -> None:
    scheduler = _scheduler(2)
    for attempt in _started(scheduler.tick(0.0)):
        scheduler.done(attempt.microbatch, 0)
    kept = _update(scheduler, 0, [0])
    _update(scheduler, 0, [1])  # made by a worker that died before it told another
    _update(scheduler, 1, [0, 1])
    assert scheduler.finished
    _update(scheduler, 0, [7], parent=kept.name)
    assert not scheduler.finished
    (again,) = _started(scheduler.tick(10.0))
    assert (again.microbatch, again.count) == (1, [True, False])


def test_a_stage_that_goes_on_from_a_checkpoint() -> None:
    scheduler = _scheduler(2, teams=(1, 1))
    for now in range(2):
        for attempt in _started(scheduler.tick(now)):
            scheduler.done(attempt.microbatch, 0)
    saved = _update(scheduler, 0, [0])
    _update(scheduler, 0, [1])
    _update(scheduler, 1, [0, 1])
    scheduler.died("s0w0", 0.0)
    scheduler.joined(Worker("s0w1", 0, "s0w1:1"))
    scheduler.ready("s0w1", saved.name)
    (again,) = _started(scheduler.tick(10.0))
    assert (again.microbatch, again.count) == (1, [True, False])


def test_another_coordinator_goes_on() -> None:
    scheduler = _scheduler(4, teams=(1, 1))
    updates = [_update(scheduler, 0, [0]), _update(scheduler, 1, [0]), _update(scheduler, 1, [1])]
    other = Scheduler(2, 4, per_worker=1.0)
    other.went_on(updates, 0.0, generation=1)
    other.joined(Worker("s0w0", 0, "a:1"), waiting=[1])
    other.joined(Worker("s1w0", 1, "b:1"))
    other.ready("s0w0", updates[0].name)
    other.ready("s1w0", updates[2].name)
    begun = _started(other.tick(0.0))
    assert [a.microbatch for a in begun] == [2, 3]
    assert all(a.number > 1000 for a in begun)  # workers may remember the numbers of the first coordinator
    assert not other.finished
    _update(other, 0, [1])
    assert other.settled == 2


def test_an_attempt_that_vanished_is_called_back() -> None:
    scheduler = _scheduler(1)
    (attempt,) = _started(scheduler.tick(0.0))
    assert scheduler.tick(PATIENCE) == []
    cancelled = scheduler.tick(PATIENCE + 1)
    assert {action.worker for action in cancelled if isinstance(action, Cancel)} == {w.name for w in attempt.route}
    assert scheduler.silent(2 * PATIENCE) == set()
    assert scheduler.silent(2 * PATIENCE + 2) == {w.name for w in attempt.route}
    for worker in attempt.route:
        scheduler.cancelled(worker.name, 0, attempt.number, counted=False)
    assert [a.number for a in _started(scheduler.tick(PATIENCE + 1))] == [attempt.number + 1]


def test_fast_workers_get_more_and_the_wiring_is_seeded() -> None:
    def picks(seed: int) -> list[str]:
        scheduler = _scheduler(300, teams=(1, 2), seed=seed)
        scheduler.workers["s1w0"].seconds, scheduler.workers["s1w1"].seconds = 0.1, 1.0
        found = []
        for now in range(300):
            for attempt in _started(scheduler.tick(now)):
                found.append(attempt.route[1].name)
                scheduler.done(attempt.microbatch, 0)
        return found

    one = picks(1)
    assert one == picks(1) != picks(2)
    assert 0 < one.count("s1w1") < 30


@pytest.mark.parametrize("seed", range(5))
def test_everything_is_counted_however_workers_come_and_go(seed: int) -> None:
    """A random history of deaths, joins, drops and failures never loses a gradient and always ends."""
    draw = random.Random(seed)
    scheduler, total, now, born = _scheduler(40), 40, 0.0, 10
    held: dict[tuple[str, int], list[int]] = {}
    running: list[Attempt] = []

    def take(actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Start):
                running.append(action.attempt)
            elif isinstance(action, Replace):
                attempt = action.attempt
                what = draw.choice(["adopted", "beyond", "failed", "nothing"])
                if what == "adopted":
                    assert scheduler.adopted(attempt.microbatch, attempt.number) is attempt
                elif what == "beyond":
                    take(scheduler.beyond(attempt.microbatch, attempt.number, now))
                elif what == "failed":
                    take(scheduler.failed(attempt.microbatch, attempt.number, now))
            else:
                has = any(action.microbatch in ms for (name, _), ms in held.items() if name == action.worker)
                scheduler.cancelled(action.worker, action.microbatch, action.attempt, has)

    for _ in range(3000):
        now += 0.1
        take(scheduler.tick(now))
        chance = draw.random()
        if chance < 0.5 and running:
            attempt = running.pop(draw.randrange(len(running)))
            if scheduler.attempts.get(attempt.microbatch) is attempt and attempt.recalled is None:
                for s, worker in enumerate(attempt.route):
                    if attempt.count[s]:
                        held.setdefault((worker.name, s), []).append(attempt.microbatch)
                scheduler.done(attempt.microbatch, attempt.number)
        elif chance < 0.9:
            living = [key for key, ms in held.items() if ms and key[0] in scheduler.workers]
            if living:
                name, stage = draw.choice(living)
                _update(scheduler, stage, held.pop((name, stage)))
        elif chance < 0.93 and scheduler.workers and now < 200:
            name = draw.choice(sorted(scheduler.workers))
            stage = scheduler.workers[name].stage
            held = {key: ms for key, ms in held.items() if key[0] != name}
            take(scheduler.died(name, now))
            _join(scheduler, stage, f"s{stage}w{born}")
            born += 1
        elif chance < 0.96 and running:
            attempt = draw.choice(running)
            take(scheduler.failed(attempt.microbatch, attempt.number, now))
        if scheduler.finished:
            break
    assert scheduler.finished
    assert scheduler.settled == total
    assert scheduler.lost == set()
    assert all(set(line.counted) == set(range(total)) for line in scheduler.lines)
    assert scheduler.twice == 0


def test_updates_are_checked_when_they_are_read() -> None:
    scheduler = _scheduler(1)
    good = _update(scheduler, 1, [0]).to_json()
    assert Update.from_json(good, 2).to_json() == good
    for name, value in [
        ("stage", 2),
        ("stage", 0),
        ("parent", "0:x"),
        ("workers", ["w", "v"]),
        ("workers", ["../w"]),
        ("bundles", []),
        ("bundles", [[]]),
        ("bundles", [[{"m": 1}]]),
        ("version", "1:0000000000000000"),
    ]:
        with pytest.raises(MalformedError):
            Update.from_json({**good, name: value}, 2)
    with pytest.raises(MalformedError):
        Update.from_json({}, 2)
