"""How a peer finishes a microbatch of a worker that died, so that the other stages keep what they have computed.

The coordinator tells the worker of the next stage who the peer is (``replace``), and that one tells the peer what it
has: the versions of its forward, and its gradient if that was sent already (``adopt``). The peer asks the worker of the
stage before it for the activation (``again``), runs the forward again, at the version of the dead worker's forward if
its ring has it, and goes on from there. What the later stages have computed from the dead worker's output stays; if
the peer's version is another one, the gradient that it finds says so, as after a version has left a ring. The gradients
of a worker whose backward was done are not taken over: an update may have them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nesterov_pp.swarm.core import StageCore
from nesterov_pp.swarm.jobs import Job, Jobs, Key
from nesterov_pp.swarm.messages import Header

KEPT_BYTES, MOST_KEPT, LEAST_KEPT = 256 << 20, 64, 2
"""Gradients that were sent are kept, in case that whoever got them dies: so many bytes of them, and so many."""
_REMEMBERED = 20_000

Send = Callable[[str, Header, Sequence[Tensor]], None]


@dataclass
class Adopted:
    """A microbatch that is taken over. ``seen`` are the versions that the next stage has seen, if it has it already."""

    route: list[list[str]]
    counts: list[bool]
    seen: list[str]
    gradient: Job | None = None


class Takeovers:
    """What a worker does when another dies. ``adopt`` and ``awaited`` are for any thread, the rest for the computer's.

    Args:
        core: the stage.
        jobs: what to compute.
        held: the microbatches between forward and backward.
        send: sends a message to an address.
        report: tells the coordinator.
    """

    def __init__(
        self,
        core: StageCore,
        jobs: Jobs,
        held: MutableMapping[Key, Job],
        send: Send,
        report: Callable[[Header], None],
    ) -> None:
        self._core, self._jobs, self._held, self._send, self._report = core, jobs, held, send, report
        self._hops: OrderedDict[tuple[Key, int], str] = OrderedDict()
        self._adopted: dict[Key, Adopted] = {}
        self._passed: OrderedDict[Key, tuple[Header, Tensor] | None] = OrderedDict()
        self._kept: deque[Key] = deque()

    # ------------------------------------------------------------------ for the computer

    def address(self, job: Job, stage: int) -> str:
        """Return where a microbatch's worker of a stage is now."""
        return self._hops.get((job.key, stage)) or job.route[stage][1]

    def of(self, key: Key) -> Adopted | None:
        return self._adopted.get(key)

    def passed(self, key: Key, header: Header, of_input: Tensor | None) -> None:
        """Note that a backward is done, and keep the gradient that was sent."""
        self._passed[key] = None if of_input is None else (header, of_input)
        if of_input is not None:
            self._kept.append(key)
            size = of_input.numel() * of_input.element_size()
            while len(self._kept) > max(LEAST_KEPT, min(MOST_KEPT, KEPT_BYTES // max(1, size))):
                self._passed[self._kept.popleft()] = None
        while len(self._passed) > _REMEMBERED:
            self._passed.popitem(last=False)

    def finished(self, key: Key, graph: str) -> None:
        """Tell the coordinator that a microbatch has been taken over, if it was, and its backward is done."""
        adopted = self._adopted.pop(key, None)
        if adopted is not None:
            before = adopted.seen[self._core.stage] if adopted.seen else None
            self._report({"kind": "adopted", "m": key[0], "a": key[1], "version": graph, "before": before})

    def early(self, job: Job) -> None:
        """Keep a gradient until the forward has run again."""
        adopted = self._adopted.get(job.key)
        if adopted is not None:
            adopted.gradient = job

    def forget(self, key: Key) -> None:
        self._adopted.pop(key, None)

    def drop_all(self) -> list[Key]:
        """Give up what is not finished, and return its keys."""
        keys = list(self._adopted)
        self._adopted.clear()
        return keys

    # ------------------------------------------------------------------ messages

    def awaited(self, key: Key) -> Job | None:
        """Return a microbatch that is being taken over."""
        adopted = self._adopted.get(key)
        return None if adopted is None else Job(*key, adopted.route, adopted.counts, [])

    def replace(self, header: Header) -> None:
        """The worker of the stage before this one has died: tell its peer what is here."""
        key, stage = (header["m"], header["a"]), header["stage"]
        address = header["route"][stage][1]
        self._hop(key, stage, address)
        passed = self._passed.get(key)
        job = self._held.get(key) or self._jobs.waiting(key)
        seen = job.forward if job is not None else passed[0]["f"] if passed is not None else []
        self._send(address, {**header, "kind": "adopt", "f": seen}, [])
        if passed is not None:
            self._send(address, *_message(*passed))
        elif key in self._passed:
            self._failed(key, "its gradient is no longer kept")

    def adopt(self, header: Header) -> None:
        """Take over a microbatch of a peer that has died."""
        key, stage = (header["m"], header["a"]), header["stage"]
        if self._jobs.is_cancelled(key):
            return
        route = header["route"]
        self._adopted[key] = Adopted(route, header["count"], header["f"])
        if stage == 0:
            self._jobs.add(Job(*key, route, header["count"], []))
        else:
            what = {"kind": "again", "m": key[0], "a": key[1], "stage": stage, "hop": route[stage]}
            self._send(route[stage - 1][1], what, [])

    def again(self, header: Header) -> None:
        """A worker of the next stage has died: send its peer what this one got, now or once it is computed."""
        key, stage, address = (header["m"], header["a"]), header["stage"], header["hop"][1]
        self._hop(key, stage, address)
        if key in self._passed or self._jobs.has_backward(key):
            self._report({"kind": "beyond", "m": key[0], "a": key[1]})
        elif (job := self._held.get(key)) is not None:
            output = self._core.output(key)
            if output is None:
                self._failed(key, "the version of its forward has left the ring")
            else:
                self._send(address, activation(job, stage), [output])

    def _hop(self, key: Key, stage: int, address: str) -> None:
        self._hops[key, stage] = address
        while len(self._hops) > _REMEMBERED:
            self._hops.popitem(last=False)

    def _failed(self, key: Key, why: str) -> None:
        self._report({"kind": "failed", "m": key[0], "a": key[1], "why": why, "to": None})


def activation(job: Job, stage: int) -> dict[str, Any]:
    """Return the header with which the output of a microbatch goes to its next stage."""
    return {
        "kind": "activation",
        "m": job.microbatch,
        "a": job.attempt,
        "route": job.route,
        "count": job.counts,
        "stage": stage,
        "f": job.forward,
    }


def _message(header: Header, tensor: Tensor) -> tuple[Header, list[Tensor]]:
    return header, [tensor]
