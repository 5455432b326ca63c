"""What the pipeline asks of a transport: messages to the neighbouring stages, and means over the replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

Messages = list[tuple[Tensor, int]]
"""Tensors to send or to receive into, each with the global rank of the other side."""


class Channel(Protocol):
    """One direction of one boundary, as one of its two processes sees it. Microbatches come in order.

    Attributes:
        next_to_post: the microbatch whose tensors ``post`` receives next.
        waited: seconds that calls have blocked so far.

    Every method raises ``PipelineError`` where the other side has stopped or does not come in time.
    """

    next_to_post: int
    waited: float

    def send(self, microbatch: int, messages: Messages) -> None:
        """Start sending; the tensors must not change until they have arrived."""

    def post(self, microbatch: int, messages: Messages) -> None:
        """Start receiving the next microbatch's tensors."""

    def take(self, microbatch: int) -> None:
        """Wait until the oldest tensors posted, which are this microbatch's, are there."""

    def finish(self) -> None:
        """Wait until everything sent has arrived."""


class Side(Protocol):
    """Whole messages between neighbours, outside training: for evaluation and prediction."""

    def send_on(self, value: Any) -> None:
        """Send tensors of any shape to the next stage."""

    def receive(self, device: torch.device) -> Any:
        """Receive what the stage before has sent."""

    def broadcast(self, value: Any, stage: int, device: torch.device) -> Any:
        """Return the ``value`` of one stage on all stages."""


class Average(Protocol):
    """Averages the gradients of one update over the replicas of a stage while its backward runs."""

    def expect(self, slot: int) -> None:
        """Say that the backward that comes next completes the gradients of this ring slot."""

    def finish(self) -> None:
        """Wait until the ``.grad`` of the slot's parameters are the means."""


class Links(Protocol):
    """How one process of a pipeline reaches the others.

    Attributes:
        inputs, outputs: activations from the stage before and to the next one; None at the ends of the pipeline.
        gradients_in, gradients_out: gradients from the next stage and to the one before; None at the ends.
        side: for evaluation and prediction.
        pipeline: the processes of this replica's stages, in order, as torch's ``PipelineStage`` wants them.
    """

    inputs: Channel | None
    outputs: Channel | None
    gradients_in: Channel | None
    gradients_out: Channel | None
    side: Side
    pipeline: dist.ProcessGroup | None

    def channels(self) -> list[Channel]:
        """Those of the four that this process has."""

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the replicas of this stage, on all of them; ``value`` itself with one replica."""

    def average(self, leaves: Sequence[Sequence[Tensor]], bucket_bytes: int) -> Average | None:
        """Average the gradients of ``leaves`` (the parameters of every ring slot) in buckets; None with one replica."""
