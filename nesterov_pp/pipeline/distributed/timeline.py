"""A record of what a stage did, and when."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple


class Event(NamedTuple):
    """One event. Times are seconds of ``time.perf_counter``, which processes of one machine share on Linux."""

    stage: int
    kind: str
    number: int
    begin: float
    end: float


class Timeline:
    """The events of one stage; records nothing unless ``record`` is true."""

    def __init__(self, stage: int, record: bool) -> None:
        self.stage, self.record = stage, record
        self.events: list[Event] = []

    @contextmanager
    def span(self, kind: str, number: int) -> Iterator[None]:
        """Record the block as an event: ``kind`` is forward, backward, step, ...; ``number`` a microbatch or update."""
        if not self.record:
            yield
            return
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.events.append(Event(self.stage, kind, number, begin, time.perf_counter()))


def chrome_trace(events: Sequence[Event]) -> str:
    """Return JSON that Perfetto and chrome://tracing open: one row per stage, times in microseconds."""
    start = min((e.begin for e in events), default=0.0)
    rows = [
        {"ph": "M", "pid": 0, "tid": stage, "name": "thread_name", "args": {"name": f"stage {stage}"}}
        for stage in sorted({e.stage for e in events})
    ]
    spans = [
        {
            "ph": "X",
            "pid": 0,
            "tid": e.stage,
            "name": f"{e.kind} {e.number}",
            "cat": e.kind,
            "ts": (e.begin - start) * 1e6,
            "dur": (e.end - e.begin) * 1e6,
        }
        for e in events
    ]
    return json.dumps({"traceEvents": [*rows, *spans]})
