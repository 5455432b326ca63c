"""Ctrl-C and SIGTERM as a request to stop soon, instead of an exception in the middle of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

STOP = (signal.SIGINT, signal.SIGTERM)


class InterruptionError(Exception):
    """The run was stopped by a signal; the message is one sentence."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.status = 128 + number


class StopRequest:
    """A block that notes the first signal in ``received``; a second one acts as it would without the block.

    With ``patient``, the second one is noted too: a launcher passes on a signal that the terminal has already sent, and
    kills processes that do not end in time. Outside the main thread, no signal is caught.
    """

    def __init__(self, patient: bool = False) -> None:
        self.received: int | None = None
        self._patient = patient
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOP}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        if not self._patient:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
