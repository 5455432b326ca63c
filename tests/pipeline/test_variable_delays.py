"""Delays that change from microbatch to microbatch, and how methods use them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import oracles
import pytest
import torch
from test_against_oracles import batch, modules
from torch import nn

from nesterov_pp.pipeline import (
    DropOuts,
    Fixed,
    Geometric,
    LocalAccumulation,
    Stragglers,
    Trace,
    Uniform,
    VirtualPipeline,
    recipes,
    stage_delays,
)

DELAYED = [name for name, recipe in recipes().items() if recipe.delayed]


@pytest.fixture(autouse=True)
def float64_scalars():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_uniform_draws_every_delay_alike_and_the_same_again():
    delays = Uniform([0, 2], [3, 2], seed=4)
    rows = [delays.draw(m) for m in range(4000)]
    assert rows == [Uniform([0, 2], [3, 2], seed=4).draw(m) for m in range(4000)]
    counts = Counter(row[0] for row in rows)
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(abs(n - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for n in counts.values())
    assert {row[1] for row in rows} == {2}
    assert delays.expected == [2, 2]


def test_geometric_has_its_mean_and_its_end():
    delays = Geometric([3.0, 0.0], [20, 20], seed=1)
    rows = [delays.draw(m) for m in range(4000)]
    mean = sum(row[0] for row in rows) / len(rows)
    # The cut at 20 affects (3 / 4)^21 of the draws, which reduces the mean by less than 0.02.
    assert mean == pytest.approx(3.0, abs=5 * (12 / 4000) ** 0.5 + 0.02)
    assert max(row[0] for row in rows) == 20
    assert {row[1] for row in rows} == {0}
    share_of_zero = sum(row[0] == 0 for row in rows) / len(rows)
    assert share_of_zero == pytest.approx(0.25, abs=0.035)


def test_stragglers_and_drop_outs():
    slow = Stragglers(Fixed([2, 0]), probability=0.25, extra=3)
    rows = [slow.draw(m) for m in range(2000)]
    assert {tuple(row) for row in rows} == {(2, 0), (5, 0), (2, 3), (5, 3)}
    assert sum(row[0] == 5 for row in rows) / 2000 == pytest.approx(0.25, abs=0.05)
    assert slow.largest == [5, 3]
    lost = DropOuts(slow, probability=0.1, seed=2)
    assert sum(lost.draw(m) is None for m in range(2000)) / 2000 == pytest.approx(0.1, abs=0.035)


def test_a_trace_from_a_file(tmp_path: Path):
    path = tmp_path / "delays.txt"
    path.write_text("# two stages\n1, 0\n-\n\n3 1  # late\n")
    trace = Trace.read(path)
    assert [trace.draw(m) for m in range(5)] == [[1, 0], None, [3, 1], [1, 0], None]
    assert trace.largest == [3, 1]
    path.write_text("1 0\n2\n")
    with pytest.raises(ValueError, match="one delay for each stage"):
        Trace.read(path)
    path.write_text("1 x\n")
    with pytest.raises(ValueError, match="line 1: a trace has whole numbers"):
        Trace.read(path)


def test_local_accumulation_replayed():
    """Replay the events of every stage: P - i forwards ahead, an update after every K backwards."""
    stages, k, microbatches = 5, 3, 40
    delays = LocalAccumulation(stages, k)
    for i in range(1, stages + 1):
        version, forwarded = 0, []
        for m in range(microbatches):
            while len(forwarded) <= min(m + stages - i, microbatches - 1):
                forwarded.append(version)
            assert version - forwarded[m] == delays.draw(m)[i - 1], (i, m)
            version += (m + 1) % k == 0
    assert max(max(delays.draw(m)) for m in range(microbatches)) == delays.largest[0] == 2


MODELS = {
    "uniform": Uniform([0] * 4, [5, 4, 2, 1], seed=3),
    "geometric": Geometric([3.0, 2.0, 1.0, 0.0], [9] * 4, seed=3),
    "trace": Trace([[3, 2, 1, 0], [7, 2, 0, 0], None, [0, 0, 0, 4]]),
    "stragglers and drop-outs": DropOuts(Stragglers(Fixed([3, 2, 1, 0]), 0.2, 4), 0.1),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("name", "oracle", "options"),
    [
        ("nesterov", oracles.NAdam, {}),
        ("pipedream-lr", oracles.Discounted, {"correction_updates": 20}),
        ("staleness-aware", oracles.StalenessAware, {}),
        ("dc-asgd", oracles.DelayCompensated, {}),
        ("gap-aware", oracles.GapAware, {}),
        ("poly-forecast", oracles.Polynomial, {"correction_updates": 20}),
        ("xpipe", oracles.XPipe, {}),
        ("gba", oracles.Adam, {"max_staleness": 2}),
    ],
)
def test_methods_take_the_delays_they_are_given(name, oracle, options, model):
    delays = MODELS[model]
    pipe = VirtualPipeline(modules(4), nn.functional.mse_loss, method=name, lr=1e-2, delays=delays, **options)
    k = pipe.microbatches_per_update
    ours = [float(pipe.step(*batch(m))) for m in range(60 * k)]
    stages = [oracle(oracles.first_weights(i), tau, 1e-2) for i, tau in enumerate(delays.expected)]
    theirs = oracles.train(stages, delays.draw, 60 * k, k, pipe.recipe.max_staleness)
    assert ours == pytest.approx(theirs, rel=1e-8)


@pytest.mark.parametrize("name", DELAYED)
def test_no_delay_is_ordinary_training(name):
    """With all delays 0, every method is its rule on the whole model, which is the pipeline of one stage."""
    options = {"method": name, "lr": 1e-2}
    if recipes()[name].correction_updates:
        options["correction_updates"] = 1
    if name in ("nesterov-no-stash", "swarm"):
        options["betas"] = (0.9, 0.999)  # otherwise they depend on the number of stages
    k = options["microbatches_per_update"] = recipes()[name].accumulation(4)
    several = VirtualPipeline(modules(4), nn.functional.mse_loss, delays=[0] * 4, **options)
    one = VirtualPipeline([nn.Sequential(*modules(4))], nn.functional.mse_loss, delays=[0], **options)
    for m in range(20 * k):
        assert float(several.step(*batch(m))) == pytest.approx(float(one.step(*batch(m))), rel=1e-9)


@pytest.mark.parametrize("name", [name for name in DELAYED if name != "swarm"])
def test_one_stage_has_no_delay(name):
    assert VirtualPipeline(modules(1), nn.functional.mse_loss, method=name).delays == [0]


def test_drop_outs_cost_updates_and_nothing_else():
    delays = DropOuts(Fixed([1, 0]), 0.3, seed=1)
    pipe = VirtualPipeline(modules(2), nn.functional.mse_loss, lr=1e-2, delays=delays)
    for m in range(50):
        pipe.step(*batch(m))
    kept = sum(delays.draw(m) is not None for m in range(50))
    assert 25 < kept < 45
    assert pipe.updates == kept
    assert pipe.microbatches == 50
    assert all(stash.newest == kept for stash in pipe.stashes)


def test_random_delays_go_on_after_a_checkpoint():
    def made() -> VirtualPipeline:
        delays = DropOuts(Uniform([0, 0], [3, 2]), 0.2)
        return VirtualPipeline(modules(2), nn.functional.mse_loss, lr=1e-2, delays=delays)

    whole, first, second = made(), made(), made()
    expected = [whole.step(*batch(m)) for m in range(40)]
    losses = [first.step(*batch(m)) for m in range(20)]
    second.load_state_dict(first.state_dict())
    losses += [second.step(*batch(m)) for m in range(20, 40)]
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))


def test_a_synchronous_start():
    """PipeMare's T3: no delay for a number of updates, then delays grow as in a pipeline that is being filled."""
    pipe = VirtualPipeline(modules(3), nn.functional.mse_loss, method="pipemare", lr=1e-2, synchronous_updates=5)
    seen = []
    for m in range(10):
        seen.append([s.newest - v for s, v in zip(pipe.stashes, pipe.versions(), strict=True)])
        pipe.step(*batch(m))
    assert seen == [[0, 0, 0]] * 6 + [[1, 1, 0]] + [[2, 1, 0]] * 3


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: VirtualPipeline(modules(2), nn.functional.mse_loss, delays=[1]), "one entry for each of 2 stages"),
        (lambda: VirtualPipeline(modules(2), nn.functional.mse_loss, delays=[1, -1]), "whole number of at least 0"),
        (
            lambda: VirtualPipeline(modules(2), nn.functional.mse_loss, method="gpipe", delays=[1, 0]),
            "waits for its gradients, so it takes no delays",
        ),
        (lambda: Uniform([3], [2]), "need low <= high for each stage"),
        (lambda: Geometric([-1.0], [2]), "a mean of at least 0"),
        (lambda: DropOuts(Fixed([1]), 1.5), "from 0 to 1, not 1.5"),
    ],
)
def test_bad_delays(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()


def test_the_nominal_delays_are_the_formula():
    for name, recipe in recipes().items():
        pipe = VirtualPipeline(modules(4), nn.functional.mse_loss, method=name)
        if not recipe.delayed:
            assert pipe.delays == [0] * 4
        elif name == "swarm":
            assert pipe.delays == sorted(pipe.delays, reverse=True)
            assert pipe.delays[0] > 3
        elif recipe.microbatches_per_update is None:
            assert pipe.delays == [1] * 4
        else:
            assert pipe.delays == stage_delays(4, recipe.microbatches_per_update)
