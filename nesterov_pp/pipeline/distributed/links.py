"""The interface of a transport: messages to the neighbouring stages, and means over the replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Channel(Protocol):
    """One direction of one boundary between stages, as one of its two processes sees it. Microbatches come in order.

    For every ``send`` at one end there is a ``post`` at the other, with as many tensors of the same sizes. Tensors are
    on the CPU or on the stage's device.

    Attributes:
        next_to_post: the microbatch whose tensors ``post`` receives next.
        backlog: the number of sends that may be on their way before another one waits for the oldest.
        marked: whether messages end with a mark, by which ``arrived`` tells; the same at both ends, and set before the
            first message.
        waited: seconds that calls have blocked so far.

    Every method raises ``PipelineError`` if the other process has stopped or does not respond in time.
    """

    next_to_post: int
    backlog: int
    marked: bool
    waited: float

    def send(self, microbatch: int, tensors: Sequence[Tensor]) -> None:
        """Start sending. The tensors must not change until they have arrived."""

    def post(self, microbatch: int, tensors: Sequence[Tensor]) -> None:
        """Start receiving into the tensors; ``microbatch`` is the next one, or the same as before."""

    def arrived(self) -> bool:
        """Return whether the oldest posted tensors have arrived, without waiting; needs ``marked``."""

    def take(self, microbatch: int) -> None:
        """Wait until the oldest posted tensors, which belong to this microbatch, have arrived."""

    def finish(self) -> None:
        """Wait until everything sent has arrived."""


class Side(Protocol):
    """Whole messages between stages outside of training, for evaluation and prediction."""

    def send_on(self, value: Any) -> None:
        """Send tensors of any shape to the next stage."""

    def receive(self, device: torch.device) -> Any:
        """Receive the value that the previous stage has sent."""

    def broadcast(self, value: Any, stage: int, device: torch.device) -> Any:
        """Return the ``value`` of one stage on all stages."""


class Average(Protocol):
    """An average of one update's gradients over the replicas of a stage, taken while backward runs."""

    def expect(self, slot: int) -> None:
        """Announce that the next backward completes the gradients of ring slot ``slot``."""

    def finish(self) -> None:
        """Wait until the ``.grad`` of the slot's parameters hold the means."""


class Links(Protocol):
    """The connections of one pipeline process to the others.

    Attributes:
        inputs, outputs: activations from the previous stage and to the next one; None at the ends of the pipeline.
        overflow_in, overflow_out: what the memory posted for activations has no room for; None at the ends.
        gradients_in, gradients_out: gradients from the next stage and to the previous one; None at the ends.
        side: messages for evaluation and prediction.
    """

    inputs: Channel | None
    outputs: Channel | None
    overflow_in: Channel | None
    overflow_out: Channel | None
    gradients_in: Channel | None
    gradients_out: Channel | None
    side: Side

    def channels(self) -> list[Channel]:
        """Return those of the six channels that this process has."""

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of ``value`` over the replicas of this stage, on all replicas; with one, ``value`` itself."""

    def average(self, leaves: Sequence[Sequence[Tensor]], bucket_bytes: int) -> Average | None:
        """Return an average of the gradients of ``leaves``, taken in buckets; None with one replica.

        ``leaves`` are the parameters of every ring slot.
        """
