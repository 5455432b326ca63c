"""What one stage exchanges with its neighbours in training: activations one way, gradients the other."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nesterov_pp.pipeline.distributed.engine import Engine
from nesterov_pp.pipeline.distributed.letters import Inbox, Outbox
from nesterov_pp.pipeline.distributed.links import Channel, Links
from nesterov_pp.pipeline.distributed.timeline import Timeline
from nesterov_pp.pipeline.wire import memory_like, pack, pack_gradients, unpack, unpack_gradients

_POLL = 0.0003
"""Seconds between looks for a message."""

_WATCH = 1.0
"""Seconds after which a stage stops looking for whichever message comes first."""


class Note(NamedTuple):
    """What the gradients of a microbatch bring along, where it matters.

    Attributes:
        weight: the weight of the microbatch's loss; None for a loss that is a mean.
        square: the squared norm of the gradients of the stages that they come from.
    """

    weight: float | None = None
    square: float = 0.0

    def as_tensor(self) -> Tensor:
        return torch.tensor([math.nan if self.weight is None else self.weight, self.square], dtype=torch.float64)


class Traffic:
    """The messages of one stage.

    Args:
        links: the connections to the other stages.
        engine: knows which gradients a microbatch needs.
        ahead: the number of messages to receive in each direction before they are needed.
        in_flight: the largest number of microbatches in flight in the pipeline.
        total: the number of microbatches of the run; nothing is received after them.
        device: where received activations go.
        notes: whether gradients bring a ``Note`` along.
        timeline: where waiting is recorded.
        eager: whether ``has_inputs_first`` will be asked.
        wire: the format of activations and gradients between stages.
    """

    def __init__(
        self,
        links: Links,
        engine: Engine,
        ahead: int,
        in_flight: int,
        total: int,
        device: torch.device,
        notes: bool,
        timeline: Timeline,
        *,
        eager: bool = False,
        wire: str | None = None,
    ) -> None:
        self._wire = wire
        self._links, self._engine, self._timeline = links, engine, timeline
        self._ahead, self._total, self._notes = ahead, total, notes
        self._inbox = self._outbox = None
        self._in_flight, self._eager, self._watched = in_flight, eager, 0.0
        if links.inputs is not None and links.overflow_in is not None:
            self._inbox = Inbox(links.inputs, links.overflow_in, ahead, device)
        if links.outputs is not None and links.overflow_out is not None:
            self._outbox = Outbox(links.outputs, links.overflow_out, ahead)
        self._arriving: deque[list[Tensor]] = deque()

    @property
    def waited(self) -> float:
        """The seconds spent waiting for neighbours so far."""
        return self._watched + sum(channel.waited for channel in self._links.channels())

    def begin(self, microbatch: int) -> None:
        """Begin with a microbatch."""
        self._watched = 0.0
        for channel in self._links.channels():
            channel.next_to_post, channel.waited = microbatch, 0.0
            channel.backlog = self._in_flight + 2
        for message in (self._links.inputs, self._links.outputs, self._links.gradients_in, self._links.gradients_out):
            if message is not None:
                message.marked = self._eager

    def finish(self) -> None:
        """Wait until everything sent has arrived."""
        for channel in self._links.channels():
            channel.finish()

    def inputs(self, m: int) -> tuple[Any, float]:
        """Receive the activations of a microbatch and the number sent with them; None and 0 on the first stage."""
        if self._inbox is None:
            return None, 0.0
        self._post_inputs(self._inbox, m)
        with self._timeline.span("wait", m):
            value, number = self._inbox.take(m)
        return unpack(value, self._wire), number

    def _post_inputs(self, inbox: Inbox, m: int) -> None:
        channel = _present(self._links.inputs)
        while channel.next_to_post < min(m + 1 + self._ahead, self._total):
            inbox.post(channel.next_to_post)

    def has_inputs_first(self, forward: int, backward: int) -> bool:
        """Wait for the activations of the next forward or the gradients of the next backward; return which to take.

        ``forward`` has not run, ``backward`` has. Where nothing comes for a while it is the forward's turn, which waits
        in a way that notices the end of a neighbour.
        """
        if self._inbox is None or self._links.inputs is None:
            return True
        self._post_inputs(self._inbox, forward)
        self._post_gradients(backward, forward)
        inputs, gradients = self._links.inputs, self._links.gradients_in
        begin = time.perf_counter()
        with self._timeline.span("wait", forward):
            while not (first := inputs.arrived()) and not (gradients is not None and gradients.arrived()):
                if time.perf_counter() - begin > _WATCH:
                    first = True
                    break
                time.sleep(_POLL)
        self._watched += time.perf_counter() - begin
        return first

    def hand_on(self, m: int, output: Any, number: float) -> None:
        """Send the activations of a microbatch and a number to the next stage, if there is one."""
        if self._outbox is not None:
            self._outbox.send(m, pack(output, self._wire), number)

    def gradients(self, m: int, forwarded: int) -> tuple[Note, list[Tensor]]:
        """Receive what the next stage hands back for a microbatch; nothing on the last stage.

        ``forwarded`` is the number of microbatches that had their forward, and so may have gradients.
        """
        channel = self._links.gradients_in
        if channel is None:
            return Note(), []
        self._post_gradients(m, forwarded)
        with self._timeline.span("wait", m):
            channel.take(m)
        arrived, found = self._arriving.popleft(), Note()
        if self._notes:
            weight, square = arrived.pop(0).tolist()
            found = Note(None if math.isnan(weight) else weight, square)
        return found, unpack_gradients(arrived, self._engine.roots(m), self._wire)

    def _post_gradients(self, m: int, forwarded: int) -> None:
        channel = self._links.gradients_in
        if channel is None:
            return
        while channel.next_to_post < min(m + 1 + self._ahead, forwarded):
            note = [torch.empty(2, dtype=torch.float64)] if self._notes else []
            roots = self._engine.roots(channel.next_to_post)
            self._arriving.append([*note, *(part for root in roots for part in memory_like(root, self._wire))])
            channel.post(channel.next_to_post, self._arriving[-1])

    def hand_back(self, m: int, note: Note, gradients: Sequence[Tensor]) -> None:
        """Send the gradients of a microbatch's inputs to the previous stage, if there is one."""
        if self._links.gradients_out is not None:
            notes = [note.as_tensor()] if self._notes else []
            self._links.gradients_out.send(m, [*notes, *pack_gradients(gradients, self._wire)])


def _present(channel: Channel | None) -> Channel:
    assert channel is not None
    return channel
