"""The transport of tensors over ``torch.distributed``: sends do not wait, and receives are posted ahead.

Every boundary has a process group for each direction, and one for the overflow of activations. Messages between two
processes are matched by their order alone, so a receive posted ahead must not stand before one that is needed sooner.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist

from nesterov_pp.pipeline.distributed.links import Average, Channel, Side
from nesterov_pp.pipeline.distributed.replicas import GradientAverage
from nesterov_pp.pipeline.distributed.store import PipelineError
from nesterov_pp.pipeline.distributed.world import World
from nesterov_pp.pipeline.tensors import to_device

T = TypeVar("T")


class _Work(NamedTuple):
    """A send or a receive on its way. It is waited for once: over gloo, a second wait would never end."""

    work: Any
    on_cpu: bool

    def wait(self, seconds: float) -> None:
        # On a GPU, a wait with a limit would block this thread; without one, it only orders the stream.
        if self.on_cpu:
            self.work.wait(timedelta(seconds=seconds))
        else:
            self.work.wait()


class TorchChannel:
    """A ``Channel`` with its own process group.

    Args:
        world: provides the timeouts, and the reason why a neighbour is gone.
        group: the process group of the two processes.
        peer: the global rank of the other process.
        stage, other: this stage and the stage at the other end, for error messages.
        what: what the channel carries, for error messages.
    """

    def __init__(self, world: World, group: dist.ProcessGroup, peer: int, stage: int, other: int, what: str) -> None:
        self._world, self._group, self._peer = world, group, peer
        self._stage, self._other, self._what = stage, other, what
        self._sent: deque[tuple[int, list[_Work], Sequence[Tensor]]] = deque()
        self._posted: deque[tuple[int, list[_Work], Tensor | None]] = deque()
        self._patience = world.first_timeout
        self.next_to_post = 0
        self.backlog = 1
        self.marked = False
        self.waited = 0.0

    def send(self, microbatch: int, tensors: Sequence[Tensor]) -> None:
        """Start sending. The tensors must not change until they have arrived."""

        def start() -> list[_Work]:
            return [_Work(dist.isend(t, self._peer, group=self._group), t.is_cpu) for t in tensors]

        if self.marked:
            tensors = [*tensors, torch.ones(1, dtype=torch.uint8)]
        self._sent.append((microbatch, self._guarded(microbatch, "send", start), tensors))
        while len(self._sent) > self.backlog:
            self._settle()

    def post(self, microbatch: int, tensors: Sequence[Tensor]) -> None:
        """Start receiving into the tensors."""

        def start() -> list[_Work]:
            return [_Work(dist.irecv(t, self._peer, group=self._group), t.is_cpu) for t in tensors]

        mark = torch.zeros(1, dtype=torch.uint8) if self.marked else None
        if mark is not None:
            tensors = [*tensors, mark]
        self._posted.append((microbatch, self._guarded(microbatch, "receive", start), mark))
        self.next_to_post = microbatch + 1

    def arrived(self) -> bool:
        """Return whether the oldest posted tensors have arrived: whether the mark that comes after them has.

        torch does not say whether a receive over gloo has completed except by waiting for it.
        """
        mark = self._posted[0][2] if self._posted else None
        return mark is not None and bool(mark.item())

    def take(self, microbatch: int) -> None:
        """Wait until the oldest posted tensors, which belong to this microbatch, have arrived."""
        posted, works, _ = self._posted.popleft()
        assert posted == microbatch
        self._wait(microbatch, "receive", works)

    def finish(self) -> None:
        """Wait until everything sent has arrived."""
        while self._sent:
            self._settle()

    def _settle(self) -> None:
        microbatch, works, _ = self._sent.popleft()
        self._wait(microbatch, "send", works)

    def _wait(self, microbatch: int, verb: str, works: Sequence[_Work]) -> None:
        self._guarded(microbatch, verb, lambda: [work.wait(self._patience) for work in works])
        self._patience = self._world.timeout  # the other stage has computed its first microbatch

    def _guarded(self, microbatch: int, verb: str, act: Callable[[], T]) -> T:
        begin = time.perf_counter()
        try:
            return act()
        except RuntimeError as error:
            raise self._explained(microbatch, verb, time.perf_counter() - begin) from error
        finally:
            self.waited += time.perf_counter() - begin

    def _explained(self, microbatch: int, verb: str, waited: float) -> PipelineError:
        preposition = "to" if verb == "send" else "from"
        what = f"the {self._what} of microbatch {microbatch + 1}"
        reason = self._world.reason()
        if reason is not None:
            return PipelineError(f"stage {self._stage} stopped because another process stopped: {reason}")
        if waited >= 0.9 * self._patience:
            name = "timeout" if self._patience == self._world.timeout else "first_timeout"
            return PipelineError(
                f"stage {self._stage} timed out after {self._patience:g} s waiting to {verb} {what} {preposition} "
                f"stage {self._other}; raise `{name}` if a stage needs longer"
            )
        return PipelineError(
            f"stage {self._stage} could not {verb} {what} {preposition} stage {self._other}: that process has ended"
        )


class TorchSide:
    """A ``Side`` over gloo on any device, so that its messages cannot interfere with those of training."""

    def __init__(self, world: World, group: dist.ProcessGroup, ranks: list[int], stage: int) -> None:
        self._world, self._group, self._ranks, self._stage = world, group, ranks, stage

    def send_on(self, value: Any) -> None:
        """Send tensors of any shape to the next stage."""
        with self._world.explained("evaluating"):
            dist.send_object_list([to_device(value, "cpu")], self._ranks[self._stage + 1], self._group)

    def receive(self, device: torch.device) -> Any:
        """Receive the value that the previous stage has sent."""
        box: list[Any] = [None]
        with self._world.explained("evaluating"):
            dist.recv_object_list(box, self._ranks[self._stage - 1], self._group)
        return to_device(box[0], device)

    def broadcast(self, value: Any, stage: int, device: torch.device) -> Any:
        """Return the ``value`` of one stage on all stages."""
        box = [to_device(value, "cpu")]
        with self._world.explained("predicting"):
            dist.broadcast_object_list(box, self._ranks[stage], self._group)
        return to_device(box[0], device)


class TorchLinks:
    """``Links`` made of process groups. Every process of the world creates them in the same order.

    Args:
        world: the ``World`` of this process.
        replicas: R; process ``rank`` is stage ``rank % P`` of replica ``rank // P``, with P the world's size over R.
    """

    def __init__(self, world: World, replicas: int) -> None:
        stages = world.size // replicas
        self.stage, self.replica, self.replicas = world.rank % stages, world.rank // stages, replicas
        i, timeout = self.stage, timedelta(seconds=world.timeout)
        longest = timedelta(seconds=max(world.timeout, world.first_timeout))
        self.inputs: Channel | None = None
        self.outputs: Channel | None = None
        self.overflow_in: Channel | None = None
        self.overflow_out: Channel | None = None
        self.gradients_in: Channel | None = None
        self.gradients_out: Channel | None = None
        self._twins: dist.ProcessGroup | None = None

        def group(ranks: list[int], timeout: timedelta = timeout, backend: str | None = None) -> dist.ProcessGroup:
            def connect() -> dist.ProcessGroup:
                return cast(dist.ProcessGroup, dist.new_group(ranks, timeout=timeout, backend=backend))

            return world.bounded("connecting the stages", connect)

        def channel(members: dist.ProcessGroup, other: int, what: str) -> Channel:
            return TorchChannel(world, members, world.rank + other - i, i, other, what)

        for replica in range(replicas):
            ranks = [replica * stages + k for k in range(stages)]
            aside = group(ranks, backend="gloo")
            if replica == self.replica:
                self.side: Side = TorchSide(world, aside, ranks, i)
            for k in range(stages - 1):
                forward, overflow, backward = (group(ranks[k : k + 2], longest) for _ in range(3))
                if world.rank == ranks[k]:
                    self.outputs = channel(forward, i + 1, "activations")
                    self.overflow_out = channel(overflow, i + 1, "activations")
                    self.gradients_in = channel(backward, i + 1, "gradients")
                elif world.rank == ranks[k + 1]:
                    self.inputs = channel(forward, i - 1, "activations")
                    self.overflow_in = channel(overflow, i - 1, "activations")
                    self.gradients_out = channel(backward, i - 1, "gradients")
        for k in range(stages if replicas > 1 else 0):
            twins = group([replica * stages + k for replica in range(replicas)])
            if k == self.stage:
                self._twins = twins

    def channels(self) -> list[Channel]:
        """Return the channels that this process has."""
        every = (
            *(self.inputs, self.outputs, self.overflow_in, self.overflow_out),
            *(self.gradients_in, self.gradients_out),
        )
        return [channel for channel in every if channel is not None]

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over the replicas of this stage."""
        if self._twins is None:
            return value
        total = value.clone()
        dist.all_reduce(total, group=self._twins)
        return total / self.replicas

    def average(self, leaves: Sequence[Sequence[Tensor]], bucket_bytes: int) -> Average | None:
        """Return an average of gradients over the replicas of this stage; None with one replica."""
        return None if self._twins is None else GradientAverage(leaves, self._twins, bucket_bytes)
