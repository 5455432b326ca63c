"""The store that processes meet in, with calls that end in time.

torch's own may block for ever when a link is gone: ``check`` reads from a socket without a limit, and so do the others
after theirs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from torch.distributed.distributed_c10d import Store

T = TypeVar("T")


class PipelineError(RuntimeError):
    """An error after which training cannot continue; its message is one sentence."""

    one_sentence = True


class Answer(Generic[T]):
    """The result of a call that runs in a thread of its own, which does not keep the process from ending."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, args=(call,), daemon=True).start()

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self._result = call()
        except BaseException as error:
            self._error = error
        self._done.set()

    @property
    def ready(self) -> bool:
        """Whether the call has returned or raised."""
        return self._done.is_set()

    def get(self, seconds: float) -> T:
        """Return what the call returns, or raise what it raises.

        Raises:
            TimeoutError: it has not ended after so many seconds; it goes on.
        """
        if not self._done.wait(max(0.0, seconds)):
            raise TimeoutError(f"no answer after {seconds:g} s")
        if self._error is not None:
            raise self._error
        result: T = self._result
        return result


class SharedStore:
    """Words that all processes of a run can read and write.

    Args:
        store: torch's.
        patience: seconds that a call may take, unless it is given its own. After one that took longer, all fail.
        where: the place of the store, for error messages.

    Every call raises ``PipelineError`` if the store does not answer in time, or is gone.
    """

    def __init__(self, store: Store, patience: float, where: str = "the store of the run") -> None:
        self._store, self._patience, self._where = store, patience, where
        self._lost: PipelineError | None = None

    def set(self, key: str, word: str, seconds: float | None = None) -> None:
        """Write a word."""
        self._bounded(lambda: self._store.set(key, word), seconds)

    def set_first(self, key: str, word: str, seconds: float | None = None) -> None:
        """Write a word, unless the key has one."""
        self._bounded(lambda: self._store.compare_set(key, "", word), seconds)

    def words(self, *keys: str, seconds: float | None = None) -> list[str] | None:
        """Return the words of the keys; None if one of them has none."""
        return self._bounded(lambda: self._words(*keys), seconds)

    def ask(self, *keys: str) -> Answer[list[str] | None]:
        """Begin ``words`` and return at once: on a slow link, an answer takes a while."""
        return Answer(lambda: self._words(*keys))

    def has(self, *keys: str, seconds: float | None = None) -> bool:
        """Return whether all keys have words."""
        return self._bounded(lambda: bool(self._store.check(list(keys))), seconds)

    def _words(self, *keys: str) -> list[str] | None:
        return [self._store.get(key).decode() for key in keys] if self._store.check(list(keys)) else None

    def _bounded(self, call: Callable[[], T], seconds: float | None) -> T:
        if self._lost is not None:
            raise self._lost
        limit = self._patience if seconds is None else seconds
        try:
            return Answer(call).get(limit)
        except TimeoutError:
            self._lost = PipelineError(
                f"{self._where} has not answered for {limit:.3g} s; check the link to the machine of the first process"
            )
        except RuntimeError as error:
            self._lost = PipelineError(f"{self._where} cannot be reached ({first_line(error)})")
        raise self._lost


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without a full stop."""
    return str(error).strip().split("\n")[0].rstrip(".")


def try_for(seconds: float, call: Callable[[], object]) -> None:
    """Call a function that may block or fail, at the end of a process, and go on after so many seconds."""
    with suppress(RuntimeError, TimeoutError):
        Answer(call).get(seconds)
