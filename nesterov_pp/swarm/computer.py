"""The thread of a worker that computes: forwards, backwards and steps, one after another."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from nesterov_pp.swarm.core import StageCore
from nesterov_pp.swarm.gradients import Gradients
from nesterov_pp.swarm.jobs import Job, Jobs, Key
from nesterov_pp.swarm.lineage import Contribution, Update
from nesterov_pp.swarm.messages import ClosedError, Header
from nesterov_pp.swarm.nests import pack
from nesterov_pp.swarm.takeover import Takeovers, activation

BEHIND_BYTES, MOST_BEHIND = 512 << 20, 256
"""Updates that wait to be applied may take so many bytes and be so many, but four in any case."""
_REMEMBERED = 20_000

T = TypeVar("T")
Send = Callable[[str, Header, Sequence[Tensor]], None]


class Computer:
    """Computes what is in ``jobs``, in the thread that calls ``run``. Other threads ask by ``between`` and ``apply``.

    Args:
        core: the stage.
        jobs: what to compute.
        gradients: where gradients go.
        send: sends a message to an address.
        report: tells the coordinator.
        want: asks the stage's workers for a round.
        slow: factor by which forwards and backwards are made to take longer.
    """

    def __init__(
        self,
        core: StageCore,
        jobs: Jobs,
        gradients: Gradients,
        send: Send,
        report: Callable[[Header], None],
        want: Callable[[], None],
        slow: float,
    ) -> None:
        self.core, self.slow = core, slow
        self.held: OrderedDict[Key, Job] = OrderedDict()
        self._task, self._stage = core.task, core.stage
        self._jobs, self._gradients = jobs, gradients
        self._send, self._report, self._want = send, report, want
        self.takeovers = Takeovers(core, jobs, self.held, send, report)
        self._counted: OrderedDict[Key, bool] = OrderedDict()
        self._events: list[list[Any]] = []
        self._seconds: dict[str, float] = {}
        self._lock, self._behind = threading.Lock(), 0
        size = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in core.shapes)
        self._most_behind = max(4, min(MOST_BEHIND, BEHIND_BYTES // max(1, size)))

    def run(self) -> None:
        """Compute until the jobs are closed."""
        while not self._jobs.closed:
            job = self._jobs.next(1.0)
            if isinstance(job, Job):
                self._do(job)
            elif job is not None:
                job()

    def between(self, act: Callable[[], T], seconds: float) -> T | None:
        """Have something done between two computations, and return what it returned; None if it takes too long."""
        found: list[T] = []
        done = threading.Event()

        def call() -> None:
            found.append(act())
            done.set()

        self._jobs.call(call)
        return found[0] if done.wait(seconds) else None

    def news(self) -> tuple[float | None, list[list[Any]]]:
        """Return the usual seconds a microbatch, and what was computed since the last call."""
        events, self._events = self._events, []
        return (sum(self._seconds.values()) if len(self._seconds) == 2 else None), events

    # ------------------------------------------------------------------ versions

    def apply(self, update: Update, sums: list[Tensor]) -> None:
        """Have an update applied after those before it."""
        with self._lock:
            self._behind += 1
        self._jobs.call(lambda: self._applied(update, sums))

    def _applied(self, update: Update, sums: list[Tensor]) -> None:
        begin = time.time()
        self.core.apply(update, sums)
        with self._lock:
            self._behind -= 1
        self._event("step", update.number + 1, begin)

    def behind(self) -> bool:
        """Whether too many updates wait to be applied."""
        return self._behind > self._most_behind

    def send_state(self, send: Callable[[Header, Sequence[Tensor]], None]) -> None:
        """Have the state sent, as it is after the updates before this call."""

        def snapshot() -> None:
            packed, tensors = pack(self.core.state())

            def deliver() -> None:
                with contextlib.suppress(ClosedError):  # whoever asked asks again, or another
                    send({"kind": "state", "state": packed}, tensors)

            threading.Thread(target=deliver, name="state", daemon=True).start()

        self._jobs.call(snapshot)

    def load(self, state: dict[str, Any]) -> str | None:
        """Take over a state, dropping what is held and what was not averaged; return why it does not fit, or None.

        Only inside ``between``, or in the thread of ``run``.
        """
        self.drop_held()
        if dropped := self._gradients.drop():
            self._report({"kind": "dropped", "microbatches": dropped})
        try:
            self.core.load(state)
        except (ValueError, KeyError, TypeError) as error:
            return str(error)
        return None

    def drop_held(self) -> None:
        """Give up all microbatches between forward and backward. As ``load``, between two computations."""
        for key in {*self.core.drop_all(), *self.takeovers.drop_all()}:
            self._jobs.cancel(key)
            self.held.pop(key, None)
            why = "dropped to take over a state"
            self._report({"kind": "failed", "m": key[0], "a": key[1], "why": why, "to": None})

    def cancel(self, key: Key) -> None:
        """Give up one microbatch, and say whether its gradient is here already."""
        self._jobs.cancel(key)
        self._jobs.call(lambda: self._cancelled(key))

    def _cancelled(self, key: Key) -> None:
        self.held.pop(key, None)
        self.core.drop(key)
        self.takeovers.forget(key)
        counted = self._counted.get(key, False) and key[0] in self._gradients.waiting
        self._report({"kind": "cancelled", "m": key[0], "a": key[1], "counted": counted})

    # ------------------------------------------------------------------ microbatches

    def _do(self, job: Job) -> None:
        if job.backward is None:
            with self._computing("forward", job.microbatch):
                self._forward(job)
        if job.backward is not None:  # also right after the forward, on the last stage
            with self._computing("backward", job.microbatch):
                self._backward(job)

    @contextlib.contextmanager
    def _computing(self, kind: str, number: int) -> Iterator[None]:
        begin = time.time()
        yield
        self._event(kind, number, begin)
        seconds = time.time() - begin
        self._seconds[kind] = 0.8 * self._seconds.get(kind, seconds) + 0.2 * seconds

    def _slowed(self, compute: Callable[[], T]) -> T:
        """Compute for ``slow`` times as long as it takes; what is found is sent afterwards.

        Waiting for a core is not computing: on a busy machine it would be multiplied, too.
        """
        begin = time.thread_time()
        found = compute()
        if self.slow > 1.0:
            time.sleep((self.slow - 1.0) * (time.thread_time() - begin))
        return found

    def _event(self, kind: str, number: int, begin: float) -> None:
        self._events.append([kind, number, begin, time.time()])

    def _forward(self, job: Job) -> None:
        core, s = self.core, self._stage
        given = self._task.batch(job.microbatch)[0] if job.given is None else job.given
        adopted = self.takeovers.of(job.key)
        seen = adopted.seen if adopted is not None else []
        wanted = seen[s] if seen else None
        output, version = self._slowed(lambda: core.forward(job.key, job.microbatch, given, wanted))
        job.forward, job.given = [*job.forward, version], None
        self.held[job.key] = job
        if core.is_last:
            loss = core.loss(job.key, self._task.batch(job.microbatch)[1])
            job.loss, job.backward = float(loss).hex(), []
        elif adopted is not None and adopted.gradient is not None:
            self._jobs.add(adopted.gradient)
        elif not seen:
            self._send(self.takeovers.address(job, s + 1), activation(job, s + 1), [output])

    def _backward(self, job: Job) -> None:
        core, s = self.core, self._stage
        if self.held.pop(job.key, None) is None:
            self.takeovers.early(job)
            return
        found = self._slowed(lambda: core.backward(job.key, job.given))
        backward = [[found.graph, found.at], *(job.backward or [])]
        if job.counts[s]:
            pairs = tuple((graph, at) for graph, at in backward)
            one = Contribution(job.microbatch, tuple(job.forward), pairs, job.loss)
            self._gradients.add(one, found.of_weights)
            self._counted[job.key] = True
            while len(self._counted) > _REMEMBERED:
                self._counted.popitem(last=False)
        self.takeovers.finished(job.key, found.graph)
        header: Header = {"m": job.microbatch, "a": job.attempt, "loss": job.loss}
        if found.of_input is None:
            self._report({**header, "kind": "done"})
        else:
            header = {**header, "kind": "gradient", "stage": s - 1, "f": job.forward, "b": backward}
            self._send(self.takeovers.address(job, s - 1), header, [found.of_input])
        self.takeovers.passed(job.key, header, found.of_input)
        if job.counts[s]:
            self._want()
