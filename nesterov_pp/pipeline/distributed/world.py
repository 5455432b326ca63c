"""The processes of a run: how they find each other, and how they learn why one of them stops."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from nesterov_pp.pipeline.distributed.store import Answer, PipelineError, SharedStore, first_line, try_for

T = TypeVar("T")

TIMEOUT = 60.0
"""Default number of seconds that processes wait for each other."""

FIRST_TIMEOUT = 600.0
"""Default number of seconds that a stage waits for the first message of another: its code may be compiled first."""

_POLL = 0.02

_LATER = 1.0
"""Seconds by which a call that has the same limit of its own is left to end by it first."""

_LAST_WORDS = 2.0
"""Seconds that a process that stops takes at most for each of: why, telling why, and disconnecting."""


@dataclass(frozen=True)
class World:
    """One process of a run: ``rank`` among ``size`` processes, with the timeouts in seconds."""

    rank: int
    size: int
    timeout: float = TIMEOUT
    store: SharedStore | None = None
    first_timeout: float = FIRST_TIMEOUT

    def tell(self, reason: str) -> None:
        """Record why this process stops, for the others to read. Only the first reason is kept."""
        if self.store is not None:
            with suppress(PipelineError):
                self.store.set_first("failure", reason, self._last_words)

    def reason(self) -> str | None:
        """Return why another process has stopped, if it recorded a reason and this process can read it."""
        if self.store is None:
            return None
        try:
            found = self.store.words("failure", seconds=self._last_words)
        except PipelineError:  # the store's process has ended, or the link to it
            return None
        return found[0] if found else None

    @property
    def _last_words(self) -> float:
        return min(self.timeout, _LAST_WORDS)

    def bounded(self, act: str, call: Callable[[], T]) -> T:
        """Return ``call()``, which connects processes and might never return.

        Raises:
            PipelineError: it fails, or does not return in time.
        """
        with self.explained(act):
            return Answer(call).get(self.timeout + _LATER)

    def gather(self, value: T) -> list[T]:
        """Return the ``value`` of every process, on all processes.

        Raises:
            PipelineError: a process has ended, or does not respond in time.
        """
        found: list[Any] = [value] * self.size
        with self.explained("gathering values"):
            dist.all_gather_object(found, value)
        return found

    def agreed(self, compute: Callable[[], T]) -> T:
        """Return on every process what process 0 computes.

        Raises:
            PipelineError: a process has ended, or does not respond in time.
        """
        box: list[Any] = [compute() if self.rank == 0 else None]
        with self.explained("agreeing on a value"):
            dist.broadcast_object_list(box, 0)
        result: T = box[0]
        return result

    @contextmanager
    def explained(self, act: str) -> Iterator[None]:
        """Turn an error of ``torch.distributed`` inside the block into one sentence.

        Raises:
            PipelineError: ``torch.distributed`` raised an error inside the block.
        """
        try:
            yield
        except PipelineError:
            raise
        except (RuntimeError, TimeoutError) as error:
            why = self.reason() or "it has ended or hangs, or the link to it is gone"
            raise PipelineError(
                f"process {self.rank} stopped while {act} because another process stopped: {why}"
            ) from error


# Leaving the group, also after an error
#
# A gloo collective runs on a thread of the group. The thread wakes the caller first and releases the caller's tensors
# afterwards, for which it takes the interpreter's lock. A process whose interpreter has ended by then aborts (status
# -6, "terminate called without an active exception") instead of ending with its own status. Destroying the group waits
# for that thread. NCCL has no such thread, and would wait for a lost neighbour's part of its operations.


@contextmanager
def connect(
    timeout: float = TIMEOUT, backend: str | None = None, first_timeout: float | None = None
) -> Iterator[World]:
    """Connect to the other processes that ``torchrun`` has started, and disconnect at the end of the block.

    The environment must have ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``, as ``torchrun`` sets them.
    After a restart by ``torchrun --max-restarts`` the processes connect afresh: addresses of processes that are gone
    are not taken for those of new ones. Every exception that leaves the block is passed on to the other processes as
    the reason why they stop too.

    Args:
        timeout: seconds to wait for the other processes, both when connecting and for every later message.
        backend: the ``torch.distributed`` backend (default: gloo, and NCCL for tensors on GPUs if every process has a
            GPU). It must carry tensors on the CPU: ``"cpu:gloo,cuda:nccl"``, not ``"nccl"``.
        first_timeout: seconds that a stage waits for the first message of each neighbour, which may have to compile
            its code first (default: 600, or ``timeout`` if that is longer).

    Raises:
        PipelineError: the environment is incomplete, the port is taken, or a process is missing.
        ValueError: the backend carries no tensors on the CPU.
    """
    if backend == "nccl":
        raise ValueError("stages also exchange tensors on the CPU; use backend='cpu:gloo,cuda:nccl' or none")
    if not dist.is_available():
        raise PipelineError("this build of torch has no torch.distributed; install one that has it")
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    where = f"the store of the run at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    whole = _store(rank, size, timeout)
    meeting = _meet(SharedStore(whole, timeout, where), rank, size, timeout)
    store = PrefixStore(f"nesterov_pp/{meeting}", whole)
    wait = timedelta(seconds=timeout)
    backend = backend or _backend()

    def join() -> None:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)

    try:
        Answer(join).get(timeout + _LATER)
    except (RuntimeError, TimeoutError) as error:
        raise PipelineError(f"process {rank} could not reach all {size} processes: {first_line(error)}") from error
    shared = SharedStore(store, timeout, where)
    world = World(rank, size, timeout, shared, max(timeout, FIRST_TIMEOUT) if first_timeout is None else first_timeout)
    try:
        yield world
        _part(world)
    except BaseException as error:
        world.tell(in_one_sentence(error))
        if "nccl" not in backend or not isinstance(error, PipelineError):
            try_for(_LAST_WORDS, dist.destroy_process_group)
        raise
    dist.destroy_process_group()


def _part(world: World) -> None:
    """Wait until all processes are done: one that leaves earlier looks like one that was killed."""
    with world.explained("waiting for the others to finish"):
        dist.barrier()


def in_one_sentence(error: BaseException) -> str:
    """Return an error's type and words, or its words alone if its class says that they are a sentence."""
    words = " ".join(str(error).split())
    if getattr(error, "one_sentence", False):
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def launched() -> bool:
    """Return whether this process is one of several that ``torchrun`` or a similar launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1) > 1 and "RANK" in os.environ


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise PipelineError(f"{name} is not set; start the processes with torchrun")
    return int(value)


def _backend() -> str:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and local_rank < torch.cuda.device_count() and dist.is_nccl_available():
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def _store(rank: int, size: int, timeout: float) -> Store:
    """Connect to the store at the address in the environment; process 0 opens it unless ``torchrun`` has.

    Raises:
        PipelineError: no process answers at the address, or the port is taken.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT")
    if not host:
        raise PipelineError("MASTER_ADDR is not set; start the processes with torchrun")
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def reach() -> Store:
        patience = timedelta(seconds=timeout)
        store = dist.TCPStore(host, port, is_master=serves, timeout=patience, wait_for_workers=False)  # type: ignore[attr-defined]
        return cast(Store, store)

    try:
        return Answer(reach).get(timeout + _LATER)
    except (RuntimeError, TimeoutError) as error:
        if serves:
            raise PipelineError(
                f"cannot listen on port {port} ({first_line(error)}); choose another with --master-port"
            ) from error
        raise PipelineError(
            f"process {rank} of {size} found no process at {host}:{port} within {timeout:g} s; check that the first "
            "process (rank 0) is running and that this machine can reach it"
        ) from error


def _meet(store: SharedStore, rank: int, size: int, timeout: float) -> str:
    """Return a name for this meeting of ``size`` processes that no other meeting in the same store has.

    ``torchrun`` keeps its store through restarts, and counts restarts per machine. So process 0 makes up a name and
    writes it down next to the cards that the others have left, and every process that finds its own card there says so.

    Raises:
        PipelineError: a process does not arrive in time.
    """
    card = uuid.uuid4().hex
    others = range(1, size)
    end = time.monotonic() + timeout

    def left() -> float:
        return max(0.0, end - time.monotonic())

    store.set(f"card/{rank}", card, left())
    name = card

    def invited() -> bool:
        nonlocal name
        found = store.words("invitation", seconds=left())
        words = found[0].split() if found else []
        if card not in words:
            return False
        name = words[0]
        store.set(f"{name}/here/{rank}", "", left())
        return store.has(f"{name}/all", seconds=left())

    def all_here() -> bool:
        cards = store.words(*(f"card/{r}" for r in others), seconds=left()) if others else []
        if cards is None:
            return False
        store.set("invitation", " ".join([card, *cards]), left())
        return not others or store.has(*(f"{card}/here/{r}" for r in others), seconds=left())

    if not _until(invited if rank else all_here, end):
        raise PipelineError(_missing(store, rank, size, timeout))
    if rank == 0:
        store.set(f"{name}/all", "", max(left(), _POLL))
    return name


def _missing(store: SharedStore, rank: int, size: int, timeout: float) -> str:
    absent = [r for r in range(size) if not store.has(f"card/{r}", seconds=min(timeout, _LAST_WORDS))]
    who = f"process {', '.join(map(str, absent))}" if absent else "another process"
    return (
        f"process {rank} timed out after {timeout:g} s waiting for {who} of {size}; start all of them, or ask for fewer"
    )


def _until(done: Callable[[], bool], end: float) -> bool:
    while not done():
        if time.monotonic() > end - _POLL:
            return False
        time.sleep(_POLL)
    return True
