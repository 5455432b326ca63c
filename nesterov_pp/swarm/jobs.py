"""What a worker has to compute, in order: what was asked of its state first, then backwards, then forwards."""

from __future__ import annotations

import heapq
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from torch import Tensor

Key = tuple[int, int]
"""A microbatch and the number of its attempt."""

_REMEMBERED = 20_000


@dataclass
class Job:
    """A forward (``given`` is its input; None: the microbatch itself) or a backward (the gradient of its output)."""

    microbatch: int
    attempt: int
    route: list[list[str]]
    counts: list[bool]
    forward: list[str]
    given: Tensor | None = None
    backward: list[list[str]] | None = None
    loss: str = ""

    @property
    def key(self) -> Key:
        return self.microbatch, self.attempt


class Jobs:
    """The queue between the threads that receive and the one that computes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._backward: list[tuple[int, int, Job]] = []
        self._forward: list[tuple[int, int, Job]] = []
        self._order = count()
        self._cancelled: OrderedDict[Key, None] = OrderedDict()
        self._begun: OrderedDict[Key, None] = OrderedDict()
        self._closed = False

    def call(self, act: Callable[[], None]) -> None:
        """Have something done between two computations, in the order of these calls."""
        with self._changed:
            self._calls.append(act)
            self._changed.notify()

    def add(self, job: Job) -> None:
        """Add a forward, or a backward if the job has a ``backward``.

        What was cancelled is left out, and so is a forward that came before: two workers may send the same one, the
        second after it has taken over what the first had.
        """
        with self._changed:
            if job.backward is None:
                if job.key in self._begun:
                    return
                _remember(self._begun, job.key)
            queue = self._forward if job.backward is None else self._backward
            heapq.heappush(queue, (job.microbatch, next(self._order), job))
            self._changed.notify()

    def cancel(self, key: Key) -> None:
        """Have an attempt's jobs, those that are still to come too, left out."""
        with self._changed:
            _remember(self._cancelled, key)

    def is_cancelled(self, key: Key) -> bool:
        return key in self._cancelled

    def waiting(self, key: Key) -> Job | None:
        """Return a forward that is still to be computed."""
        with self._changed:
            return next((job for _, _, job in self._forward if job.key == key), None)

    def has_backward(self, key: Key) -> bool:
        """Whether a backward is still to be computed."""
        with self._changed:
            return any(job.key == key for _, _, job in self._backward)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def next(self, seconds: float) -> Callable[[], None] | Job | None:
        """Return what to do next; None if there is nothing for so long, or the queue is closed."""
        with self._changed:
            if not self._ready():
                self._changed.wait(seconds)
            if self._closed:
                return None
            if self._calls:
                return self._calls.popleft()
            for queue in (self._backward, self._forward):
                while queue:
                    job = heapq.heappop(queue)[2]
                    if job.key not in self._cancelled:
                        return job
            return None

    @property
    def closed(self) -> bool:
        return self._closed

    def _ready(self) -> bool:
        return bool(self._closed or self._calls or self._backward or self._forward)


def _remember(keys: OrderedDict[Key, None], key: Key) -> None:
    keys[key] = None
    while len(keys) > _REMEMBERED:
        keys.popitem(last=False)
