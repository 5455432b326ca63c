"""Simulated swarms compared with closed forms, and ``plan --swarm``."""

from __future__ import annotations

import contextlib
import math

import pytest

from nesterov_pp.cli import main
from nesterov_pp.planning import Network, StageCost, simulate
from nesterov_pp.planning.swarm import Speeds, best_rate, long_enough, simulate_swarm
from nesterov_pp.planning.swarm_events import ROUND_SECONDS
from nesterov_pp.swarm.quorum import DEAD_AFTER
from nesterov_pp.swarm.scheduler import GRACE

EQUAL = StageCost(1.0, 2.0, message_bytes=100, weight_bytes=1000)
IDEAL = Network()


def rate(costs, speeds, network=IDEAL, run=400, **more):
    return simulate_swarm(costs, speeds, network, run, **more).microbatches_per_second


@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("network", [IDEAL, Network(0.05, 1e4)])
def test_one_worker_a_stage_is_the_pipeline(stages, network):
    costs = [EQUAL] * stages
    pipeline = 1 / simulate("async", costs, IDEAL, 400).seconds_per_microbatch
    assert rate(costs, [[1.0]] * stages, network) == pytest.approx(pipeline, rel=0.01)


def test_the_slowest_stage_sets_the_pace():
    costs = [EQUAL, StageCost(2.0, 4.0), EQUAL]
    assert rate(costs, [[1.0]] * 3) == pytest.approx(1 / 6, rel=0.01)
    assert rate(costs, [[1.0], [2.0], [1.0]]) == pytest.approx(1 / 3, rel=0.01)
    assert best_rate(costs, [[1.0, 1.0], [1.0, 0.5], [1.0, 1.0]]) == pytest.approx(1.5 / 6)


def test_a_step_takes_time_on_every_worker_of_its_stage():
    """Worker i computes ``r_i`` microbatches a second: ``3 r_i + 0.6 u = speed_i``, if there are u updates a second.

    There is an update for every gradient at most, and for every third at least.
    """
    cost = StageCost(1.0, 2.0, step=0.6)
    assert rate([cost], [[1.0]]) == pytest.approx(1 / 3.6, rel=0.01)
    found = rate([cost], [[1.0, 0.9, 0.8]], run=1000, in_flight=8)
    assert 0.99 * 2.7 / (3 + 3 * 0.6) <= found <= 2.7 / (3 + 0.6)


@pytest.mark.parametrize("workers", [2, 4, 16])
def test_equal_workers_add_up(workers):
    found = rate([EQUAL] * 2, [[1.0] * workers] * 2, run=200 * workers, in_flight=8)
    assert 0.96 * workers / 3 <= found <= 1.01 * workers / 3


def test_a_slow_worker_is_given_less():
    team = [1.0, 1.0, 1.0, 0.1]
    found = rate([EQUAL] * 2, [team] * 2, run=1500, in_flight=8) / rate(
        [EQUAL] * 2, [[1.0] * 4] * 2, run=1500, in_flight=8
    )
    assert 0.9 * 3.1 / 4 <= found <= 1.03 * 3.1 / 4


def test_two_microbatches_in_flight_wait_for_long_links():
    """One worker has two microbatches in flight: a round trip of the link, twice, beside computing."""
    found = rate([StageCost(1.0, 1.0)] * 2, [[1.0]] * 2, Network(latency=20.0), in_flight=1)
    assert found == pytest.approx(2 / (4 * 20.0 + 4.0), rel=0.03)


def test_bundles_share_the_links():
    """A gradient of 100 s on the link keeps the activations beside it waiting."""
    small, large = (StageCost(0.1, 0.2, message_bytes=10, weight_bytes=size) for size in (0, 1000))
    links = Network(bandwidth=10.0)
    assert rate([large] * 2, [[1.0] * 4] * 2, links) < 0.8 * rate([small] * 2, [[1.0] * 4] * 2, links)


def test_times_that_vary():
    """One worker keeps its pace; in a row of them, somebody waits."""
    assert rate([EQUAL], [[1.0]], run=4000, variation=0.7) == pytest.approx(1 / 3, rel=0.05)
    assert rate([EQUAL] * 4, [[1.0]] * 4, run=2000, variation=0.7) < 0.95 / 3


def test_a_forward_and_the_backward_after_it_vary_apart():
    """On the last stage, too, where one follows the other: the tail of their sum is that of two times, not of one."""
    costs = [StageCost(1.0, 2.0)] * 2
    largest = [
        simulate_swarm(costs, [[1.0] * 3] * 2, IDEAL, 2600, variation=0.9, seed=s).largest_delays for s in range(5)
    ]
    assert sum(last for _, last in largest) / 5 < 15
    assert all(last < first for first, last in largest)


def test_delays():
    found = simulate_swarm([EQUAL] * 3, [[1.0]] * 3, IDEAL, 400)
    assert found.mean_delays[0] > found.mean_delays[1] > found.mean_delays[2] == pytest.approx(1.0, abs=0.02)
    assert all(largest >= mean for largest, mean in zip(found.largest_delays, found.mean_delays, strict=True))
    assert (found.sent_again, found.failures, found.without_worker) == (0, 0, 0.0)


def churn(seed: int, run: int = 2000, **more):
    given = {"failure_seconds": 150.0, "rejoin_seconds": 10.0, **more}
    return simulate_swarm([StageCost(0.1, 0.2)] * 2, [[1.0] * 3] * 2, IDEAL, run, seed=seed, **given)


def test_a_seed_decides_everything():
    assert churn(1) == churn(1)
    assert churn(1) != churn(2)


def test_failures_cost_throughput_and_send_work_again():
    calm, rare, often = (churn(0, failure_seconds=seconds) for seconds in (math.inf, 300.0, 60.0))
    assert calm.microbatches_per_second > rare.microbatches_per_second > often.microbatches_per_second > 0
    assert calm.sent_again + calm.taken_over == 0
    assert 0 < rare.taken_over < often.taken_over
    assert often.failures / often.seconds == pytest.approx(6 / (60.0 + 10.0), rel=0.25)


def test_workers_that_are_away_are_missed():
    """One stage: its throughput is that of the workers that are there, less what is lost with the others."""
    found = simulate_swarm(
        [StageCost(0.1, 0.2)], [[1.0] * 10], IDEAL, 20_000, failure_seconds=100.0, rejoin_seconds=100.0, in_flight=4
    )
    assert found.share_of_best == pytest.approx(0.5, rel=0.12)


def test_a_stage_without_a_worker_waits():
    found = simulate_swarm(
        [StageCost(0.1, 0.2)] * 2, [[1.0]] * 2, IDEAL, 1500, failure_seconds=40.0, rejoin_seconds=20.0
    )
    away = 1 - (40 / (40 + 20)) ** 2
    assert found.without_worker == pytest.approx(away, abs=0.12)
    assert found.microbatches_per_second < (1 - away) / 0.3
    assert found.failures > 10


def test_a_swarm_that_gets_nowhere_ends():
    found = simulate_swarm([EQUAL], [[1.0]], IDEAL, 40, failure_seconds=0.5, rejoin_seconds=1.0)
    assert found.microbatches < 40
    assert found.microbatches_per_second == pytest.approx(0.0, abs=0.01)
    found = simulate_swarm([EQUAL], [[1.0]], IDEAL, 40, failure_seconds=1e-9, rejoin_seconds=0.0)
    assert (found.microbatches, found.failures) == (0, 10_000)


def test_what_came_after_the_checkpoint_is_lost_with_the_last_worker():
    one = {"failure_seconds": 60.0, "rejoin_seconds": 5.0}
    often, rarely = (
        simulate_swarm([StageCost(0.1, 0.2)], [[1.0]], IDEAL, 1000, checkpoint_every=every, **one)
        for every in (1, 1000)
    )
    assert rarely.sent_again > 10 * often.sent_again
    assert rarely.microbatches_per_second < 0.7 * often.microbatches_per_second


def test_a_thousand_workers():
    costs = [StageCost(0.1, 0.2, 0.005, message_bytes=10**6, weight_bytes=10**6)] * 8
    run = long_enough(best_rate(costs, [[1.0] * 125] * 8), 8, 1000, math.inf, 0.5)
    found = simulate_swarm(costs, [[1.0] * 125] * 8, Network(0.01, 1e9), run, in_flight=0.5, failure_seconds=3600.0)
    assert found.microbatches == run
    assert 0 < found.share_of_best < 1


def test_long_enough():
    assert long_enough(10.0, 2, 8, math.inf, 2.0) == 400
    assert long_enough(10.0, 2, 1000, math.inf, 2.0) == 10_000
    assert long_enough(10.0, 2, 8, 60.0, 2.0) == 1500  # 20 failures, one every 7.5 s
    assert long_enough(10.0, 2, 8, 1e9, 2.0) == 50_000


def test_speeds():
    assert Speeds((1.0, 0.1)).of(2, 3) == [[1.0, 0.1, 1.0]] * 2
    drawn = Speeds((0.5, 2.0), drawn=True).of(2, 50)
    assert drawn == Speeds((0.5, 2.0), drawn=True).of(2, 50)
    assert all(0.5 <= speed <= 2.0 for team in drawn for speed in team)
    assert max(max(team) for team in drawn) > 1.5
    with pytest.raises(ValueError, match="3 speeds do not fit 2 workers a stage; give more --workers"):
        Speeds((1.0, 1.0, 0.5)).of(1, 2)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"costs": []}, "at least one stage"),
        ({"speeds": [[1.0]]}, "for each of at least one stage"),
        ({"speeds": [[1.0], []]}, "at least one worker"),
        ({"speeds": [[1.0], [0.0]]}, "speeds above 0"),
        ({"costs": [EQUAL, StageCost(0.0, 0.0)]}, "a time for its forward and backward above 0"),
        ({"microbatches": 3}, "at least 4 microbatches"),
        ({"in_flight": 0.0}, "in_flight and checkpoint_every above 0"),
        ({"failure_seconds": 0.0}, "failure_seconds must be above 0"),
        ({"variation": -1.0}, "variation must be a finite number"),
        ({"rejoin_seconds": math.inf}, "rejoin_seconds a finite time"),
    ],
)
def test_bad_input(given, sentence):
    usual = {"costs": [EQUAL] * 2, "speeds": [[1.0]] * 2, "network": IDEAL, "microbatches": 10}
    with pytest.raises(ValueError, match=sentence):
        simulate_swarm(**{**usual, **given})


SMALL = ["--layers", "4", "--width", "32", "--heads", "2", "--context", "16", "--batch", "2"]


def test_the_command(capsys):
    flags = [
        "--devices",
        "2,4",
        "--workers",
        "3",
        "--speeds",
        "1,0.5",
        "--failures",
        "0.01",
        "--rejoin",
        "5",
        "--speed",
        "0.01",
        "--variation",
        "0.5",
    ]
    assert main(["plan", *SMALL, "--swarm", *flags, "--latency", "1", "--bandwidth", "1"]) == 0
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    found = [[cell.strip() for cell in row] for row in rows if row[0].strip().isdecimal()]
    assert [row[:2] for row in found] == [["2", "3"], ["4", "3"]]
    assert all(float(row[2]) > 0 and 0 < float(row[4].rstrip("%")) < 100 for row in found)
    assert all(int(row[7].split()[0]) > 5 and int(row[8].split()[0]) > 5 for row in found)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--workers 3", "--workers needs --swarm"),
        ("--rejoin 0", "--rejoin needs --swarm"),
        ("--variation 1", "--variation needs --swarm"),
        ("--swarm --variation -0.1", "needs a number from 0 to 10, not '-0.1'"),
        ("--swarm --variation nan", "needs a number, not 'nan'"),
        ("--swarm --slack 0", "plan --swarm has no --slack"),
        ("--swarm --memory 8", "plan --swarm has no --memory"),
        ("--swarm --speeds 2..1", "needs a range from the least to the largest speed, not '2..1'"),
        ("--swarm --speeds 1,0", "needs a number above 0, not '0'"),
        ("--swarm --in-flight 1e9", "needs a number from 0.01 to 100, not '1e9'"),
        ("--swarm --devices 2,4 --workers 9999", "more than the 10000 that are simulated"),
        ("--swarm --devices 2 --method gpipe", "waits for its gradients, which a swarm never does"),
    ],
)
def test_flags_that_do_not_fit(capsys, flags, sentence):
    with contextlib.suppress(SystemExit):  # argparse's own
        assert main(["plan", *SMALL, *flags.split()]) != 0
    assert sentence in capsys.readouterr().err


def test_a_death_holds_the_rounds_and_its_work_for_a_moment():
    """The constants are those of the swarm itself."""
    assert ROUND_SECONDS < DEAD_AFTER < GRACE
