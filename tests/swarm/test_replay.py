"""The replay of a trace, against workers driven at random in one process, and against the virtual pipeline."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from swarm_task import task
from torch import Tensor

from nesterov_pp.pipeline import Trace, VirtualPipeline
from nesterov_pp.swarm.core import StageCore
from nesterov_pp.swarm.lineage import ROOT, Contribution, Update
from nesterov_pp.swarm.replay import replay
from nesterov_pp.swarm.task import Task

METHODS = ["swarm", "nesterov", "nesterov-rotated"]


class _Driver:
    """Two workers a stage whose events come in a random order, with forks; every one is recorded."""

    def __init__(self, what: Task, seed: int) -> None:
        self.task, self.random = what, random.Random(seed)
        self.teams = [[StageCore(what, s) for _ in range(2)] for s in range(what.stages)]
        self.bundles: dict[StageCore, list[tuple[Contribution, list[Tensor]]]] = {
            core: [] for team in self.teams for core in team
        }
        self.updates: list[Update] = []

    def microbatch(self, m: int) -> None:
        route = [self.random.choice(team) for team in self.teams]
        inputs, targets = self.task.batch(m)
        hidden, forward = inputs, []
        for core in route:
            hidden, version = core.forward(m, m, hidden)
            forward.append(version)
            self.maybe_update()
        loss = float(route[-1].loss(m, targets)).hex()
        gradient, backward = None, []
        for core in reversed(route):
            self.maybe_update()
            found = core.backward(m, gradient)
            gradient, backward = found.of_input, [(found.graph, found.at), *backward]
            self.bundles[core].append((Contribution(m, tuple(forward), tuple(backward), loss), found.of_weights))

    def maybe_update(self) -> None:
        for team in self.teams:
            if self.random.random() < 0.5:
                self.update(team)

    def update(self, team: list[StageCore]) -> None:
        parts = [(f"w{i}", self.bundles[core]) for i, core in enumerate(team) if self.bundles[core]]
        if not parts:
            return
        workers, bundles = zip(*parts, strict=True)
        update = Update(
            team[0].stage, team[0].version, workers, tuple(tuple(c for c, _ in bundle) for bundle in bundles)
        )
        sums = [_summed([g for _, g in bundle]) for bundle in bundles]
        total = _summed(sums)
        for core in team:
            core.apply(update, [t.clone() for t in total])
            self.bundles[core] = []
        self.updates.append(update)


def _summed(parts: list[list[Tensor]]) -> list[Tensor]:
    total = [t.clone() for t in parts[0]]
    for part in parts[1:]:
        for a, b in zip(total, part, strict=True):
            a.add_(b)
    return total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_replay_equals_workers_in_any_order(method: str, stages: int) -> None:
    what = task(method, stages)
    driver = _Driver(what, seed=stages)
    for m in range(14):
        driver.microbatch(m)
    for team in driver.teams:
        driver.update(team)
    random.Random(0).shuffle(driver.updates)
    found = replay(what, driver.updates, [team[0].version for team in driver.teams])
    assert found.unlike == []
    assert {m for m, _, _ in found.losses} == set(range(14))
    for team, weights in zip(driver.teams, found.weights, strict=True):
        for core in team:
            for name, p in core.stash.weights().items():
                assert torch.equal(p, weights[name])


def test_an_altered_trace_is_found_out() -> None:
    what = task("nesterov", 2)
    driver = _Driver(what, seed=1)
    for m in range(12):
        driver.microbatch(m)
    driver.update(driver.teams[0])
    update = driver.updates[-1]
    first, *others = update.contributions
    driver.updates[-1] = replace(update, workers=("w0",), bundles=((replace(first, loss=(1.5).hex()), *others),))
    final = [driver.updates[-1].name, driver.teams[1][0].version]
    assert replay(what, driver.updates, final).unlike == [first.microbatch]


def test_late_versions_run_forward_again() -> None:
    what = replace(task("nesterov", 2), versions=2)
    core = StageCore(what, 0)
    for key in ("early", "late"):
        core.forward(key, 0, what.batch(0)[0])
    gradient = torch.randn(what.boundary, generator=torch.Generator().manual_seed(0))
    for key in ("early", 1, 2):
        if key != "early":
            core.forward(key, 1, what.batch(1)[0])
        found = core.backward(key, gradient)
        one = Contribution(0, (found.graph, ROOT), ((found.graph, found.at), (ROOT, ROOT)), "0x0p+0")
        core.apply(Update(0, core.version, ("w",), ((one,),)), found.of_weights)
    assert core.backward("late", gradient).graph == core.version


@pytest.mark.parametrize("method", METHODS)
def test_replay_equals_the_virtual_pipeline(method: str) -> None:
    """Stage i has one worker, which runs ``tau_i`` forwards ahead, and updates after every backward."""
    what, stages, run = task(method, 3), 3, 20
    ahead = [2, 1, 0]
    names = [[ROOT] for _ in range(stages)]
    updates: dict[int, list[Update]] = {s: [] for s in range(stages)}
    losses: list[float] = []
    pipe = VirtualPipeline(
        [what.build(s) for s in range(stages)],
        what.loss_fn,
        method=what.recipe,
        lr=what.rate(0),
        delays=Trace([[min(m, a) for a in ahead] for m in range(run)]),
        seed=what.seed,
    )
    for m in range(run):
        pipe.lr = what.rate(m)
        losses.append(float(pipe.step(*what.batch(m))))
        forward = tuple(names[s][m - min(m, ahead[s])] for s in range(stages))
        at = [forward[s] if what.stashes else names[s][m] for s in range(stages)]
        for s in range(stages):
            backward = tuple((forward[j], at[j]) for j in range(s, stages))
            update = Update(s, names[s][-1], ("w",), ((Contribution(m, forward, backward, losses[-1].hex()),),))
            updates[s].append(update)
            names[s].append(update.name)
    found = replay(what, [u for part in updates.values() for u in part], [part[-1] for part in names])
    assert found.unlike == []
    for stash, weights in zip(pipe.stashes, found.weights, strict=True):
        for name, p in stash.weights().items():
            assert torch.equal(p, weights[name])


def test_a_joining_worker_takes_over_everything() -> None:
    from nesterov_pp.swarm.nests import pack, unpack

    what = task("nesterov-rotated", 2)
    driver = _Driver(what, seed=5)
    for m in range(10):
        driver.microbatch(m)
    old, new = driver.teams[0][0], StageCore(what, 0)
    state: Any = unpack(*pack(old.state()))
    new.load(state)
    assert (new.version, new.counted, new.stash.newest) == (old.version, old.counted, old.stash.newest)
    gradients = [torch.ones(shape) for _, shape in old.shapes]
    one = Contribution(10, (old.version, ROOT), ((old.version, old.version), (ROOT, ROOT)), "0x0p+0")
    update = Update(0, old.version, ("w",), ((one,),))
    for core in (old, new):
        core.apply(update, [g.clone() for g in gradients])
    for p, q in zip(old.stash.weights().values(), new.stash.weights().values(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match="stage 0 is not one of stage 1"):
        StageCore(what, 1).load(old.state())
