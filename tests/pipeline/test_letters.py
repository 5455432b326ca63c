"""Messages of any shapes over a boundary, with a channel in memory in the place of a network."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from nesterov_pp.pipeline.distributed import letters
from nesterov_pp.pipeline.distributed.letters import Inbox, Outbox

CPU = torch.device("cpu")


class Wire:
    """Both ends of a ``Channel``: what is sent arrives in what was posted, and nowhere else."""

    def __init__(self) -> None:
        self._sent: deque[Tensor] = deque()
        self._posted: deque[list[Tensor]] = deque()
        self.log: list[Tensor] = []
        self.next_to_post, self.waited = 0, 0.0

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.log)

    def send(self, _: int, tensors: Sequence[Tensor]) -> None:
        self._sent += tensors
        self.log += tensors

    def post(self, microbatch: int, tensors: Sequence[Tensor]) -> None:
        self._posted.append(list(tensors))
        self.next_to_post = microbatch + 1

    def take(self, _: int) -> None:
        for memory in self._posted.popleft():
            arrived = self._sent.popleft()
            assert arrived.dtype == memory.dtype
            assert arrived.numel() == memory.numel()
            memory.copy_(arrived)

    def finish(self) -> None: ...


class Boundary:
    """An ``Outbox`` and the ``Inbox`` at the other end."""

    def __init__(self, ahead: int) -> None:
        self.ahead, self.channel, self.overflow = ahead, Wire(), Wire()
        self.outbox = Outbox(self.channel, self.overflow, ahead)
        self.inbox = Inbox(self.channel, self.overflow, ahead, CPU)

    def carry(self, values: Sequence[Any]) -> list[Any]:
        """Send everything first, so that nothing that is received could have helped; return what arrives."""
        for m, value in enumerate(values):
            self.outbox.send(m, value, m / 3)
        arrived = []
        for m in range(len(values)):
            while self.channel.next_to_post < min(m + 1 + self.ahead, len(values)):
                self.inbox.post(self.channel.next_to_post)
            value, note = self.inbox.take(m)
            assert note == m / 3
            arrived.append(value)
        return arrived


def assert_same(found: Any, wanted: Any) -> None:
    ours, our_spec = tree_flatten(found)
    theirs, their_spec = tree_flatten(wanted)
    assert our_spec == their_spec
    for mine, other in zip(ours, theirs, strict=True):
        if not isinstance(other, Tensor):
            assert mine == other
            continue
        assert (mine.shape, mine.dtype, mine.requires_grad) == (other.shape, other.dtype, other.requires_grad)
        assert torch.equal(mine, other)
        assert mine.is_leaf


def any_nest(draw: random.Random) -> Any:
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float64)

    def tensor() -> Tensor:
        shape = [draw.randrange(4) for _ in range(draw.randrange(4))]
        made = (3.0 * torch.randn(shape)).to(draw.choice(dtypes))
        made = made.t() if made.dim() == 2 else made
        return made.requires_grad_(made.is_floating_point() and draw.random() < 0.5)

    def nest(depth: int) -> Any:
        kind = draw.randrange(7 if depth else 3)
        if kind < 2:
            return tensor()
        if kind == 2:
            return draw.choice([None, 3, "words", 2.5, True])
        parts = [nest(depth - 1) for _ in range(draw.randrange(4))]
        if kind == 3:
            return parts
        return tuple(parts) if kind < 6 else OrderedDict(zip("abc", parts, strict=False))

    return nest(2)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_any_nest_arrives(ahead: int) -> None:
    torch.manual_seed(0)
    draw = random.Random(ahead)
    values = [any_nest(draw) for _ in range(120)]
    for found, wanted in zip(Boundary(ahead).carry(values), values, strict=True):
        assert_same(found, wanted)


def test_constant_shapes_need_no_overflow_and_no_copy() -> None:
    """After the first messages, a head of four numbers and the tensor's own bytes are all that is sent."""
    boundary = Boundary(ahead=1)
    values = [torch.full((5, 3), float(m)) for m in range(30)]
    for found, wanted in zip(boundary.carry(values), values, strict=True):
        assert torch.equal(found, wanted)
    assert boundary.channel.log[-1].data_ptr() == values[-1].data_ptr()
    assert boundary.channel.bytes == 30 * 32 + 28 * 60
    assert boundary.overflow.bytes < 2 * (60 + 400)


def test_weights_are_copied_before_a_step_changes_them() -> None:
    boundary = Boundary(ahead=1)
    weight = torch.nn.Parameter(torch.ones(4, 3))
    values = [weight, weight[1:], weight.t(), (weight, weight.view(-1))] * 3
    wanted = [torch.ones(4, 3), torch.ones(3, 3), torch.ones(3, 4), (torch.ones(4, 3), torch.ones(12))] * 3
    for m, value in enumerate(values):
        boundary.outbox.send(m, value)
    with torch.no_grad():
        weight.fill_(2.0)
    for m, expected in enumerate(wanted):
        while boundary.channel.next_to_post < min(m + 2, len(values)):
            boundary.inbox.post(boundary.channel.next_to_post)
        found, _ = boundary.inbox.take(m)
        for ours, theirs in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            assert torch.equal(ours.detach(), theirs)


def test_lengths_that_vary_travel_in_cells() -> None:
    """Only what is longer than everything of late overflows."""
    boundary = Boundary(ahead=1)
    draw = random.Random(0)
    values = [torch.randn(draw.randrange(1, 200), 8) for _ in range(300)]
    for found, wanted in zip(boundary.carry(values), values, strict=True):
        assert torch.equal(found, wanted)
    assert boundary.channel.bytes < 2.1 * sum(t.numel() * 4 for t in values)


def test_layouts_do_not_pile_up() -> None:
    boundary = Boundary(ahead=1)
    values = [(torch.ones(1), number) for number in range(2 * letters._KNOWN + 10)]
    assert [number for _, number in boundary.carry(values)] == [number for _, number in values]
    assert len(boundary.inbox._layouts._layouts) <= letters._KNOWN


def test_what_cannot_be_sent_is_named() -> None:
    outbox = Boundary(ahead=1).outbox
    with pytest.raises(ValueError, match="a stage hands on a value that cannot be sent to another process"):
        outbox.send(0, {"act": lambda: None})
    with pytest.raises(ValueError, match="stages exchange dense tensors, not tensors of layout"):
        outbox.send(0, torch.eye(3).to_sparse())
