"""Averages of gradients over the replicas of a stage, taken while its backward is still running."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from nesterov_pp.optim.local import is_dtensor
from nesterov_pp.stash import gathers_itself

BUCKET_BYTES = 25 * 2**20
"""Bytes of gradients that are sent together, as in ``DistributedDataParallel``."""


def check_shards(module: nn.Module) -> None:
    """Raise ValueError if the stage has DTensor parameters that do not come from ``fully_shard``."""
    if not gathers_itself(module) and any(map(is_dtensor, module.parameters())):
        raise ValueError(
            "a stage with DTensor parameters that are not from fully_shard cannot be in an AsyncPipeline, where the "
            "replicas of a stage work on different microbatches; use fully_shard or plain parameters"
        )


class GradientAverage:
    """An all-reduce of one update's gradients in buckets, each sent as soon as the last of its gradients has arrived.

    Args:
        leaves: the parameters of every ring slot, in the same order; all gradients of an update are on one slot.
            Parameters that ``fully_shard`` keeps are left to it.
        group: the replicas of the stage.
        bucket_bytes: bytes to send at a time.
    """

    def __init__(
        self, leaves: Sequence[Sequence[Tensor]], group: dist.ProcessGroup, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self._group = group
        self._replicas = dist.get_world_size(group)
        self._leaves = [[p for p in slot if not is_dtensor(p)] for slot in leaves]
        self._buckets = _buckets(self._leaves[0], bucket_bytes)
        self._slot, self._next = -1, 0
        self._missing: list[set[int]] = []
        self._works: list[tuple[Any, Tensor, list[Tensor]]] = []
        home = {i: b for b, members in enumerate(self._buckets) for i in members}
        for slot, parameters in enumerate(self._leaves):
            for i, p in enumerate(parameters):
                p.register_post_accumulate_grad_hook(self._hook(slot, i, home[i]))  # type: ignore[no-untyped-call]

    def expect(self, slot: int) -> None:
        """Announce that the next backward completes the gradients of ``slot``."""
        self._slot, self._next = slot, 0
        leaves = self._leaves[slot]
        self._missing = [{i for i in members if leaves[i].requires_grad} for members in self._buckets]

    def finish(self) -> None:
        """Send the remaining buckets, with zeros for missing gradients, and write the averages into ``.grad``.

        Parameters that are frozen, on all replicas alike, have no gradient.
        """
        while self._next < len(self._buckets):
            self._send()
        self._slot = -1
        for work, flat, grads in self._works:
            work.wait()
            flat /= self._replicas
            for grad, part in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
                grad.copy_(part.view_as(grad))
        self._works.clear()

    def _hook(self, slot: int, index: int, bucket: int) -> Any:
        def arrived(_: Tensor) -> None:
            if slot != self._slot:
                return
            self._missing[bucket].discard(index)
            # In bucket order, so that every replica sends the same buckets in the same sequence.
            while self._next < len(self._buckets) and not self._missing[self._next]:
                self._send()

        return arrived

    def _send(self) -> None:
        leaves = self._leaves[self._slot]
        parameters = [leaves[i] for i in self._buckets[self._next] if leaves[i].requires_grad]
        self._next += 1
        if not parameters:
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        self._works.append((dist.all_reduce(flat, group=self._group, async_op=True), flat, grads))


def _buckets(parameters: Sequence[Tensor], limit: int) -> list[list[int]]:
    """Return buckets of indices of parameters of one dtype, last parameters first: backward reaches them first."""
    buckets: list[list[int]] = []
    room, dtype = 0, None
    for i in reversed(range(len(parameters))):
        size = parameters[i].numel() * parameters[i].element_size()
        if not buckets or size > room or parameters[i].dtype != dtype:
            buckets.append([])
            room, dtype = limit, parameters[i].dtype
        buckets[-1].append(i)
        room -= size
    return buckets
