"""The order of events, played with stages that only count: it never deadlocks, and every version is there in time."""

from __future__ import annotations

import json

import pytest

from nesterov_pp.pipeline import stage_delays, version_for_update
from nesterov_pp.pipeline.delay_models import forwards_ahead
from nesterov_pp.pipeline.distributed.timeline import Event, Timeline, chrome_trace
from nesterov_pp.pipeline.schedule import drained_before, forward_limit


class Stage:
    def __init__(self, ahead: int, delay: int, k: int, flush_every: int | None, stop: int) -> None:
        self.ahead, self.delay, self.k, self.flush_every, self.stop = ahead, delay, k, flush_every, stop
        self.forwarded = self.done = 0
        self.most_in_flight = 0

    def next_is_forward(self) -> bool:
        limit = forward_limit(
            self.done,
            ahead=self.ahead,
            delay=self.delay,
            microbatches_per_update=self.k,
            flush_every=self.flush_every,
            stop=self.stop,
        )
        return self.forwarded <= limit

    def forward(self) -> None:
        update = self.forwarded // self.k
        version = version_for_update(update, self.delay, drained_before(update, self.flush_every))
        newest = self.done // self.k
        assert version <= newest, "its weights are not there yet"
        assert version >= newest - self.delay, "its weights have left the ring"
        self.forwarded += 1
        self.most_in_flight = max(self.most_in_flight, self.forwarded - self.done)


@pytest.mark.parametrize("flush_every", [None, 1, 3])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    ("delayed", "slack", "eager"), [(True, 0, False), (False, 0, False), (True, 3, False), (True, 3, True)]
)
def test_stages_never_wait_for_each_other_in_a_circle(
    count: int, k: int, flush_every: int | None, delayed: bool, slack: int, eager: bool
) -> None:
    stop = 12 * k
    delays = stage_delays(count, k, slack) if delayed else [0] * count
    aheads = forwards_ahead(count, slack)
    stages = [Stage(aheads[i], delays[i], k, flush_every, stop) for i in range(count)]
    while any(stage.done < stop for stage in stages):
        progress = False
        for i, stage in enumerate(stages):
            if stage.done == stop:
                continue
            has_input = i == 0 or stages[i - 1].forwarded > stage.forwarded
            has_gradient = stage.forwarded > stage.done and (i == count - 1 or stages[i + 1].done > stage.done)
            if stage.next_is_forward() and has_input:
                stage.forward()
                progress = True
            elif has_gradient and (eager or not stage.next_is_forward()):
                stage.done += 1
                progress = True
        assert progress, [(s.forwarded, s.done) for s in stages]
    assert all(stage.most_in_flight <= stage.ahead + 1 for stage in stages)
    if delayed and k == 1 and flush_every is None and not eager:
        assert [stage.most_in_flight for stage in stages] == [min(tau + 1, stop) for tau in delays]


def test_a_timeline_records_only_when_asked() -> None:
    silent, loud = Timeline(0, record=False), Timeline(1, record=True)
    for line in (silent, loud):
        with line.span("forward", 7):
            pass
    assert silent.events == []
    ((stage, kind, number, begin, end),) = loud.events
    assert (stage, kind, number) == (1, "forward", 7)
    assert begin <= end


def test_the_trace_is_what_perfetto_reads() -> None:
    events = [Event(0, "forward", 0, 10.0, 10.5), Event(1, "wait", 0, 10.0, 10.25)]
    rows = json.loads(chrome_trace(events))["traceEvents"]
    names = [row["args"]["name"] for row in rows if row["ph"] == "M"]
    assert names == ["stage 0", "stage 1"]
    spans = [(r["tid"], r["name"], r["ts"], r["dur"]) for r in rows if r["ph"] == "X"]
    assert spans == [(0, "forward 0", 0.0, 500_000.0), (1, "wait 0", 0.0, 250_000.0)]
