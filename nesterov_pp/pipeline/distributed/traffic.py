"""What one stage exchanges with its neighbours in training: activations one way, gradients the other."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nesterov_pp.pipeline.distributed.engine import Engine
from nesterov_pp.pipeline.distributed.letters import Inbox, Outbox
from nesterov_pp.pipeline.distributed.links import Channel, Links
from nesterov_pp.pipeline.distributed.timeline import Timeline


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
        total: the number of microbatches of the run; nothing is received after them.
        device: where received activations go.
        notes: whether gradients bring a ``Note`` along.
        timeline: where waiting is recorded.
    """

    def __init__(
        self,
        links: Links,
        engine: Engine,
        ahead: int,
        total: int,
        device: torch.device,
        notes: bool,
        timeline: Timeline,
    ) -> None:
        self._links, self._engine, self._timeline = links, engine, timeline
        self._ahead, self._total, self._notes = ahead, total, notes
        self._inbox = self._outbox = None
        if links.inputs is not None and links.overflow_in is not None:
            self._inbox = Inbox(links.inputs, links.overflow_in, ahead, device)
        if links.outputs is not None and links.overflow_out is not None:
            self._outbox = Outbox(links.outputs, links.overflow_out, ahead)
        self._arriving: deque[list[Tensor]] = deque()

    @property
    def waited(self) -> float:
        """The seconds spent waiting for neighbours so far."""
        return sum(channel.waited for channel in self._links.channels())

    def begin(self, microbatch: int) -> None:
        """Begin with a microbatch."""
        for channel in self._links.channels():
            channel.next_to_post, channel.waited = microbatch, 0.0

    def finish(self) -> None:
        """Wait until everything sent has arrived."""
        for channel in self._links.channels():
            channel.finish()

    def inputs(self, m: int) -> tuple[Any, float]:
        """Receive the activations of a microbatch and the number sent with them; None and 0 on the first stage."""
        if self._inbox is None:
            return None, 0.0
        channel = _present(self._links.inputs)
        while channel.next_to_post < min(m + 1 + self._ahead, self._total):
            self._inbox.post(channel.next_to_post)
        with self._timeline.span("wait", m):
            return self._inbox.take(m)

    def hand_on(self, m: int, output: Any, number: float) -> None:
        """Send the activations of a microbatch and a number to the next stage, if there is one."""
        if self._outbox is not None:
            self._outbox.send(m, output, number)

    def gradients(self, m: int, forwarded: int) -> tuple[Note, list[Tensor]]:
        """Receive what the next stage hands back for a microbatch; nothing on the last stage.

        ``forwarded`` is the number of microbatches that had their forward, and so may have gradients.
        """
        channel = self._links.gradients_in
        if channel is None:
            return Note(), []
        while channel.next_to_post < min(m + 1 + self._ahead, forwarded):
            note = [torch.empty(2, dtype=torch.float64)] if self._notes else []
            self._arriving.append([*note, *self._engine.gradients_like(channel.next_to_post)])
            channel.post(channel.next_to_post, self._arriving[-1])
        with self._timeline.span("wait", m):
            channel.take(m)
        arrived = self._arriving.popleft()
        if not self._notes:
            return Note(), arrived
        weight, square = arrived.pop(0).tolist()
        return Note(None if math.isnan(weight) else weight, square), arrived

    def hand_back(self, m: int, note: Note, gradients: Sequence[Tensor]) -> None:
        """Send the gradients of a microbatch's inputs to the previous stage, if there is one."""
        if self._links.gradients_out is not None:
            self._links.gradients_out.send(m, [*([note.as_tensor()] if self._notes else []), *gradients])


def _present(channel: Channel | None) -> Channel:
    assert channel is not None
    return channel
