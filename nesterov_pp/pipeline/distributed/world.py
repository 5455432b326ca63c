"""The processes of a run: finding each other, and telling each other why one of them stops."""

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

T = TypeVar("T")

TIMEOUT = 60.0
"""Seconds that processes wait for each other by default."""

_ANSWER = 10.0  # seconds to ask the store why a neighbour is gone
_POLL = 0.02


class PipelineError(RuntimeError):
    """Training cannot go on; the message is one sentence."""


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``size``. ``timeout`` in seconds."""

    rank: int
    size: int
    timeout: float = TIMEOUT
    store: Store | None = None

    def tell(self, reason: str) -> None:
        """Leave word for the others why this process stops; the first word stays."""
        if self.store is not None:
            with suppress(RuntimeError):
                self.store.compare_set("failure", "", reason)

    def reason(self) -> str | None:
        """Why another process has stopped, where it left word."""
        if self.store is None:
            return None
        try:
            return self.store.get("failure").decode() if self.store.check(["failure"]) else None
        except RuntimeError:  # the store went with its process
            return None

    def gather(self, value: T) -> list[T]:
        """The ``value`` of every process, on all of them.

        Raises:
            PipelineError: one of them has ended, or does not come in time.
        """
        found: list[Any] = [value] * self.size
        with self.explained("gathering"):
            dist.all_gather_object(found, value)
        return found

    def agreed(self, compute: Callable[[], T]) -> T:
        """What process 0 computes, on every process.

        Raises:
            PipelineError: one of them has ended, or does not come in time.
        """
        box: list[Any] = [compute() if self.rank == 0 else None]
        with self.explained("agreeing"):
            dist.broadcast_object_list(box, 0)
        result: T = box[0]
        return result

    @contextmanager
    def explained(self, act: str) -> Iterator[None]:
        """What ``torch.distributed`` raises inside the block becomes one sentence.

        Raises:
            PipelineError: so it did.
        """
        try:
            yield
        except RuntimeError as error:
            why = self.reason() or "another process has ended or hangs"
            raise PipelineError(f"process {self.rank} stopped while {act}, because elsewhere {why}") from error


# Leaving the group, also after an error
#
# A collective of gloo runs on a thread of the group, which wakes the caller first and lets go of the caller's tensors
# afterwards, and for that it takes the interpreter's lock. A process that has ended its interpreter by then aborts
# (status -6, "terminate called without an active exception") instead of ending with its own status. Destroying the
# group waits for that thread. NCCL has no such thread, and would wait for a lost neighbour's part of its operations.


@contextmanager
def connect(timeout: float = TIMEOUT, backend: str | None = None) -> Iterator[World]:
    """Meet the other processes that ``torchrun`` has started, and part from them at the end of the block.

    Environment: ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``, as ``torchrun`` sets them. A restart by
    ``torchrun --max-restarts`` meets afresh: addresses of processes that are gone are not taken for those of new ones.

    Args:
        timeout: seconds to wait for the others, now and for every message later.
        backend: of ``torch.distributed``; default: NCCL for tensors on GPUs where every process has one, and gloo.

    Raises:
        PipelineError: the environment is incomplete, the port is taken, or a process is missing. Every exception that
            leaves the block is passed on to the other processes as the reason why they stop too.
    """
    if not dist.is_available():
        raise PipelineError("this torch was built without torch.distributed; install one that has it")
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    store = _store(rank, size, timeout)
    store = PrefixStore(f"nesterov_pp/{_meet(store, rank, size, timeout)}", store)
    wait = timedelta(seconds=timeout)
    backend = backend or _backend()
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    except RuntimeError as error:
        raise PipelineError(f"process {rank} could not reach all of the {size} processes: {_first(error)}") from error
    world = World(rank, size, timeout, store)
    try:
        yield world
        _part(world)
    except BaseException as error:
        world.tell(" ".join(str(error).split()) or type(error).__name__)
        if "nccl" not in backend or not isinstance(error, PipelineError):
            with suppress(RuntimeError):
                dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _part(world: World) -> None:
    """Nobody leaves before all are done: a process that has gone looks like one that was killed."""
    with world.explained("waiting for the others to finish"):
        dist.barrier()


def launched() -> bool:
    """Whether this process is one of several that ``torchrun`` or the like has started."""
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
    """Raises: PipelineError: nobody answers at the address, or it is taken."""
    host, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT")
    if not host:
        raise PipelineError("MASTER_ADDR is not set; start the processes with torchrun")
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        patience = timedelta(seconds=timeout)
        store = dist.TCPStore(host, port, is_master=serves, timeout=patience, wait_for_workers=False)  # type: ignore[attr-defined]
        return cast(Store, store)
    except RuntimeError as error:
        if serves:
            raise PipelineError(
                f"port {port} cannot be listened on ({_first(error)}); choose another with --master-port"
            ) from error
        raise PipelineError(
            f"process {rank} of {size} found nobody at {host}:{port} within {timeout:g} s; is the first process "
            "(rank 0) running, and can this machine reach it?"
        ) from error


def _meet(store: Store, rank: int, size: int, timeout: float) -> str:
    """A name for this meeting of ``size`` processes, which no other meeting in the same store has.

    ``torchrun`` keeps its store through restarts, and counts these by machine. So process 0 makes up a name, writes it
    down with the cards that the others have left, and everyone who finds his own card beside it says so.

    Raises:
        PipelineError: not all came in time.
    """
    card = uuid.uuid4().hex
    others = range(1, size)
    store.set(f"card/{rank}", card)

    def cards() -> str | None:
        keys = [f"card/{r}" for r in others]
        return " ".join(store.get(k).decode() for k in keys) if not keys or store.check(keys) else None

    name = card

    def invited() -> bool:
        nonlocal name
        words = store.get("invitation").decode().split() if store.check(["invitation"]) else []
        if card not in words:
            return False
        name = words[0]
        store.set(f"{name}/here/{rank}", "")
        return store.check([f"{name}/all"])

    def all_here() -> bool:
        found = cards()
        if found is None:
            return False
        store.set("invitation", f"{card} {found}")
        return size == 1 or bool(store.check([f"{card}/here/{r}" for r in others]))

    if not _until(invited if rank else all_here, timeout):
        raise PipelineError(_missing(store, rank, size, timeout))
    if rank == 0:
        store.set(f"{name}/all", "")
    return name


def _missing(store: Store, rank: int, size: int, timeout: float) -> str:
    absent = [r for r in range(size) if not store.check([f"card/{r}"])]
    who = f"process {', '.join(map(str, absent))}" if absent else "another process"
    return f"process {rank} waited {timeout:g} s for {who} of {size}; start all of them, or ask for fewer"


def _until(done: Callable[[], bool], timeout: float) -> bool:
    end = time.monotonic() + timeout
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL)
    return True


def _first(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
