"""Nests of tensors of any shapes as messages of one boundary, received before their shapes are known.

[note: a cell of a size agreed in advance]
Tensors travel while stages compute only if memory to receive them is posted early, and then its size has to be known
before the message exists. So every message consists of

- a head: the number of its layout, the size of the layout's description if it is new, the size of a later cell, and one
  number that the stages have to say;
- a cell: the first bytes of its tensors, in memory that the receiver posted together with the head;
- an overflow: the description of a new layout and the bytes that the cell has no room for.

The head of message ``j`` sets the size of the cell of message ``j + 1 + ahead``, the first one that the receiver
posts after reading it: that of the largest of the last messages. While shapes stay the same, every cell fits exactly,
a single tensor is sent and received in place, and there is no overflow. If lengths vary, cells are as large as the
longest of late. The first messages have no cells.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nesterov_pp.pipeline.distributed.links import Channel
from nesterov_pp.pipeline.tensors import map_tensors, tensors_of

_RECENT = 16
"""A cell is as large as the largest of this many messages."""

_KNOWN = 1024
"""After this many layouts both ends forget all of them, so that values that never repeat cannot fill the memory."""

_ALIGNED = 64
"""Tensors begin at multiples of this many bytes."""


@dataclass(frozen=True)
class Blank:
    """A place for a tensor in a layout."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.shape.numel() * self.dtype.itemsize


def blank(tensor: Tensor) -> Blank:
    """Return the place that a tensor takes in a layout.

    Raises:
        ValueError: the tensor is sparse.
    """
    if tensor.layout != torch.strided:
        raise ValueError(f"stages exchange dense tensors, not tensors of layout {tensor.layout}; hand on .to_dense()")
    return Blank(tensor.shape, tensor.dtype, tensor.requires_grad)


@dataclass(frozen=True)
class Layout:
    """A nest whose tensors are ``Blank``; what a receiver needs to know about a message besides its bytes."""

    nest: Any

    @cached_property
    def blanks(self) -> list[Blank]:
        found: list[Blank] = []
        tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, Blank) else None, self.nest)
        return found

    @cached_property
    def offsets(self) -> list[int]:
        """Where each tensor begins, and, last, the number of bytes in all."""
        offsets = [0]
        for each in self.blanks:
            offsets.append(offsets[-1] + -(-each.size // _ALIGNED) * _ALIGNED)
        return [*offsets[:-1], offsets[-2] + self.blanks[-1].size] if self.blanks else offsets

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the bytes of the tensors; those of a single contiguous one in place.

        A weight is copied: the next step may write to it before it has arrived.
        """
        if len(tensors) == 1 and not _is_weight(tensors[0]):
            return _bytes_of(tensors[0].detach())
        device = tensors[0].device if tensors else "cpu"
        packed = torch.empty(self.offsets[-1], dtype=torch.uint8, device=device)
        for place, tensor in zip(self._places(packed), tensors, strict=True):
            place.copy_(tensor.detach())
        return packed

    def unpack(self, packed: Tensor) -> Any:
        """Return the nest with tensors whose memory is that of ``packed``."""
        places = iter(self._places(packed))

        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, Blank):
                return leaf
            return next(places).requires_grad_(leaf.requires_grad)

        return tree_map(fill, self.nest)

    def _places(self, packed: Tensor) -> list[Tensor]:
        return [
            packed[begin : begin + each.size].view(each.dtype).view(each.shape)
            for each, (begin, _) in zip(self.blanks, pairwise(self.offsets), strict=True)
        ]


class Layouts:
    """The layouts that both ends of a boundary know by number, in the order in which they first came."""

    def __init__(self) -> None:
        self._numbers: dict[Blank | bytes, int] = {}
        self._layouts: list[Layout] = []

    def number(self, key: Blank | bytes) -> int | None:
        """Return the number of a layout, None if it is new. A key is a tensor's blank, or a nest's description."""
        return self._numbers.get(key)

    def add(self, key: Blank | bytes, description: bytes) -> int:
        """Add a new layout; return its number."""
        if len(self._layouts) == _KNOWN:
            self._numbers.clear()
            self._layouts.clear()
        self._numbers[key] = len(self._layouts)
        self._layouts.append(Layout(pickle.loads(description)))
        return len(self._layouts) - 1

    def __getitem__(self, number: int) -> Layout:
        return self._layouts[number]


class Outbox:
    """The sending end of a boundary.

    Args:
        channel: carries heads and cells.
        overflow: carries what has no room in a cell.
        ahead: the number of messages that the receiver posts before it needs them.
    """

    def __init__(self, channel: Channel, overflow: Channel, ahead: int) -> None:
        self._channel, self._overflow = channel, overflow
        self._layouts = Layouts()
        self._cells = deque([0] * (1 + ahead))
        self._recent: deque[int] = deque(maxlen=_RECENT)

    def send(self, microbatch: int, value: Any, note: float = 0.0) -> None:
        """Start sending a nest and a number. The tensors must not change until they have arrived.

        Raises:
            ValueError: the nest holds something that cannot be sent.
        """
        tensors = tensors_of(value)
        key = blank(value) if isinstance(value, Tensor) else _described(map_tensors(blank, value))
        number, news = self._layouts.number(key), b""
        if number is None:
            news = key if isinstance(key, bytes) else _described(key)
            number = self._layouts.add(key, news)
        packed = self._layouts[number].pack(tensors)
        self._recent.append(packed.numel())
        cell = self._cells.popleft()
        self._cells.append(max(self._recent))
        head = torch.tensor([number, len(news), self._cells[-1], note], dtype=torch.float64)
        self._channel.send(microbatch, [head, _filled(packed, cell)] if cell else [head])
        rest = [torch.frombuffer(bytearray(news), dtype=torch.uint8)] if news else []
        rest += [packed[cell:]] if packed.numel() > cell else []
        if rest:
            self._overflow.send(microbatch, rest)


class Inbox:
    """The receiving end of a boundary. ``ahead`` must be that of the ``Outbox``."""

    def __init__(self, channel: Channel, overflow: Channel, ahead: int, device: torch.device) -> None:
        self._channel, self._overflow, self._device = channel, overflow, device
        self._layouts = Layouts()
        self._cells = deque([0] * (1 + ahead))
        self._posted: deque[tuple[Tensor, Tensor]] = deque()

    def post(self, microbatch: int) -> None:
        """Start receiving the next microbatch."""
        head = torch.empty(4, dtype=torch.float64)
        cell = torch.empty(self._cells.popleft(), dtype=torch.uint8, device=self._device)
        self._posted.append((head, cell))
        self._channel.post(microbatch, [head, cell] if cell.numel() else [head])

    def take(self, microbatch: int) -> tuple[Any, float]:
        """Wait for the oldest message posted, which belongs to this microbatch; return its nest and its number."""
        self._channel.take(microbatch)
        head, cell = self._posted.popleft()
        *whole, note = head.tolist()
        number, news, next_cell = map(int, whole)
        self._cells.append(next_cell)
        if news:
            description = bytes(self._take_rest(microbatch, torch.empty(news, dtype=torch.uint8)).numpy())
            self._layouts.add(description, description)
        layout, packed = self._layouts[number], cell
        size, room = layout.offsets[-1], cell.numel()
        if size > room:
            packed = torch.empty(size, dtype=torch.uint8, device=self._device)
            packed[:room].copy_(cell)
            self._take_rest(microbatch, packed[room:])
        return layout.unpack(packed), note

    def _take_rest(self, microbatch: int, memory: Tensor) -> Tensor:
        self._overflow.post(microbatch, [memory])
        self._overflow.take(microbatch)
        return memory


def _described(nest: Any) -> bytes:
    try:
        return pickle.dumps(nest)
    except Exception as error:
        raise ValueError(
            f"a stage hands on a value that cannot be sent to another process ({error}); stages exchange tensors and "
            "plain values in tuples, lists and dicts"
        ) from error


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, in place if it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _is_weight(tensor: Tensor) -> bool:
    """Return whether a tensor is a parameter or a view of one."""
    owner = tensor._base if tensor._is_view() else tensor
    return owner is not None and owner.is_leaf and owner.requires_grad


def _filled(packed: Tensor, size: int) -> Tensor:
    """Return the first ``size`` bytes, with anything after those that there are."""
    if packed.numel() >= size:
        return packed[:size]
    cell = torch.empty(size, dtype=torch.uint8, device=packed.device)
    cell[: packed.numel()].copy_(packed)
    return cell
