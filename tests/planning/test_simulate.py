"""Simulated schedules compared with closed forms and with an independent recurrence."""

from __future__ import annotations

import numpy as np
import pytest

from nesterov_pp.planning import Network, StageCost, least_slack, memory_per_stage, simulate, stage_costs

F, B, S = 1.0, 2.0, 0.5
EQUAL = StageCost(F, B, S, message_bytes=100, weight_bytes=1000, activation_bytes=10)


@pytest.mark.parametrize("stages", [1, 2, 4, 8, 64])
def test_without_a_network_only_the_flush_costs(stages):
    n, run = 4, 64 * 4
    found = simulate("async", [EQUAL] * stages, Network(), run)
    assert found.seconds_per_microbatch == pytest.approx(F + B + S)
    assert found.utilisation == pytest.approx(1.0)
    assert found.waiting == pytest.approx([0.0] * stages)
    for schedule in ("gpipe", "1f1b"):
        flushed = simulate(schedule, [EQUAL] * stages, Network(), run, n)
        assert flushed.seconds_per_microbatch == pytest.approx(((n + stages - 1) * (F + B) + S) / n)
        assert flushed.utilisation == pytest.approx((n * (F + B) + S) / ((n + stages - 1) * (F + B) + S))


@pytest.mark.parametrize("schedule", ["async", "1f1b", "gpipe"])
def test_a_slower_stage_sets_the_pace(schedule):
    slow = StageCost(2 * F, 2 * B, 2 * S)
    found = simulate(schedule, [EQUAL, slow, EQUAL], Network(), 400, 1 if schedule == "async" else 100)
    least = 2 * (F + B) + (2 * S if schedule == "async" else 2 * S / 100)
    assert found.seconds_per_microbatch == pytest.approx(least, rel=0.03)
    assert found.waiting[1] == pytest.approx(0.0, abs=0.03)
    assert found.waiting[0] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("latency", [0.0, 0.25, 3.0])
def test_two_microbatches_in_flight_hide_no_latency(latency):
    """The first of two stages has two microbatches in flight; a round trip is F + B on each and twice the link."""
    costs = [StageCost(1.0, 1.0), StageCost(1.0, 1.0)]
    found = simulate("async", costs, Network(latency=latency), 200)
    assert found.seconds_per_microbatch == pytest.approx((4.0 + 2 * latency) / 2)


@pytest.mark.parametrize(("stages", "latency", "slack"), [(8, 0.5, 7), (8, 0.125, 2), (4, 1.0, 6), (2, 0.5, 1)])
def test_enough_slack_hides_the_links(stages, latency, slack):
    """The round trip of 2 (P - 1) latencies takes as long as computing ``slack`` microbatches."""
    costs = [StageCost(0.25, 0.5, 0.25)] * stages
    hidden = simulate("async", costs, Network(latency), 400, slack=slack)
    assert hidden.seconds_per_microbatch == pytest.approx(1.0)
    assert max(hidden.waiting) == pytest.approx(0.0, abs=1e-9)
    bare = simulate("async", costs, Network(latency), 400)
    # Gradients are sent before the step.
    assert bare.seconds_per_microbatch == pytest.approx(1 + (2 * latency - 0.25) * (1 - 1 / stages))
    found = least_slack(costs, Network(latency))
    assert found <= slack
    assert simulate("async", costs, Network(latency), 400, slack=found).seconds_per_microbatch < 1.06
    if found:
        assert simulate("async", costs, Network(latency), 400, slack=found - 1).seconds_per_microbatch > 1.04


def test_without_a_stash_slack_helps_by_the_link():
    """Stages that keep to one order of events hide what every link has of its own."""
    costs = [StageCost(0.25, 0.75)] * 4
    times = [simulate("async", costs, Network(0.4), 400, slack=n, stash=False).seconds_per_microbatch for n in range(4)]
    assert times[3] == pytest.approx(1.0)
    assert times[2] > 1.2
    assert least_slack(costs, Network(0.4), stash=False) == 3
    assert least_slack(costs, Network(0.0), stash=False) == 0


def test_no_slack_helps_where_a_link_is_the_limit():
    costs = [StageCost(0.25, 0.75, message_bytes=100)] * 4
    thin = Network(latency=0.1, bandwidth=50.0)
    slack = least_slack(costs, thin)
    assert simulate("async", costs, thin, 400, slack=slack).seconds_per_microbatch == pytest.approx(2.0, rel=0.06)


def test_on_a_thin_link_the_first_stages_round_trip_sets_the_pace():
    """A round trip of its P microbatches in flight: 2 (P - 1) links, forward and backward of P stages, its own step."""
    found = simulate("async", [EQUAL] * 4, Network(bandwidth=10.0), 800)
    assert found.seconds_per_microbatch == pytest.approx((6 * 100 / 10.0 + 4 * (F + B) + S) / 4)


def test_gpipe_against_a_recurrence():
    rng = np.random.default_rng(0)
    stages, n, updates = 5, 6, 8
    forward, backward, step = rng.uniform(0.5, 2.0, (3, stages))
    latency = 0.3
    costs = [StageCost(*c) for c in zip(forward, backward, step, strict=True)]
    free = np.zeros(stages)
    ends = []
    for _ in range(updates):
        arrived = np.zeros(n)
        for i in range(stages):
            for m in range(n):
                free[i] = max(free[i], arrived[m]) + forward[i]
                arrived[m] = free[i] + latency
        arrived = np.zeros(n)
        for i in reversed(range(stages)):
            for m in range(n):
                free[i] = max(free[i], arrived[m]) + backward[i]
                arrived[m] = free[i] + latency
            free[i] += step[i]
        ends.append(free[-1])
    found = simulate("gpipe", costs, Network(latency=latency), n * updates, n)
    assert found.seconds_per_microbatch == pytest.approx((ends[-1] - ends[updates // 2 - 1]) / (updates // 2 * n))
    assert found.seconds == pytest.approx(free.max())


def test_memory_by_hand():
    assert memory_per_stage("async", [EQUAL] * 4) == [7030 + 10, 6030, 5020, 4010]
    assert memory_per_stage("async", [EQUAL] * 4, stash=False) == [4040, 4030, 4020, 4010]
    assert memory_per_stage("async", [EQUAL] * 4, slack=3) == [10030 + 40, 8050, 6030, 4010]
    assert memory_per_stage("gpipe", [EQUAL] * 4, 8) == [4080] * 4
    assert memory_per_stage("1f1b", [EQUAL] * 4, 3) == [4030, 4030, 4020, 4010]


def test_layers_are_cut_so_that_the_slowest_stage_is_as_fast_as_can_be():
    layers = [StageCost(t, 2 * t, 0.0, message_bytes=int(10 * t), weight_bytes=1) for t in (3.0, 1.0, 1.0, 1.0)]
    first, second = stage_costs(layers, 2, speed=2.0)
    assert (first.forward, second.forward) == (1.5, 1.5)
    assert (first.message_bytes, second.weight_bytes) == (30, 3)
    with pytest.raises(ValueError, match="4 layers cannot be cut into 5 stages"):
        stage_costs(layers, 5)


@pytest.mark.parametrize(
    ("schedule", "microbatches", "k", "message"),
    [
        ("2f2b", 8, 1, "unknown schedule '2f2b'; choose one of async, gpipe, 1f1b"),
        ("gpipe", 9, 4, "a multiple of 4 microbatches, at least 8, not 9"),
        ("async", 1, 1, "a multiple of 1 microbatches, at least 2, not 1"),
    ],
)
def test_bad_input(schedule, microbatches, k, message):
    with pytest.raises(ValueError, match=message):
        simulate(schedule, [EQUAL], Network(), microbatches, k)
