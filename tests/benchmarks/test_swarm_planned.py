"""What a simulation of a swarm is given: the times that were measured in it."""

from __future__ import annotations

import pytest

from benchmarks.swarm_planned import seconds_back


def test_a_worker_is_away_from_its_death_until_its_successor_computes():
    def event(kind, worker, t):
        return {"kind": kind, "worker": worker, "t": t}

    events = [event("joined", "a", 0.0), event("joined", "b", 0.1), event("ready", "a", 1.0), event("ready", "b", 1.1)]
    events += [event("left", "a", 10.0), event("joined", "c", 12.0), event("ready", "c", 13.0)]
    events += [event("left", "b", 20.0), event("joined", "d", 23.0), event("ready", "d", 25.0)]
    events += [event("taken over", "d", 26.0), event("left", "c", 30.0), event("left", "d", 30.0)]  # the run ends
    assert seconds_back(events, kills=2) == pytest.approx((3.0 + 5.0) / 2)
