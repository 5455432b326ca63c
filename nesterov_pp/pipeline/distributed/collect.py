"""The state of all stages, brought to process 0 tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor
from torch import distributed as dist

from nesterov_pp.pipeline.distributed.world import World
from nesterov_pp.pipeline.export import Entry


def collected(world: World, stages: int, own: Iterator[Entry]) -> Iterator[Entry] | None:
    """Send the entries of this process's stage to process 0, and return those of all stages there; None elsewhere.

    All processes of ``world`` call it. Those of replicas other than the first only compute their entries, because
    tensors that are spread over replicas are put together by all of them.

    Raises:
        PipelineError: another process has stopped, or does not respond in time. (On process 0, from the iterator.)
    """
    group = _group(world)
    if world.rank == 0:
        return _received(world, stages, own, group)
    with world.explained("sending weights"):
        for name, value in own:
            if world.rank >= stages:
                continue
            form = (value.dtype, value.shape) if isinstance(value, Tensor) else None
            dist.send_object_list([(name, form, None if form else value)], 0, group)
            if isinstance(value, Tensor) and value.numel():
                dist.send(value.view(-1).view(torch.uint8), 0, group)
        if world.rank < stages:
            dist.send_object_list([None], 0, group)
    return None


def _group(world: World) -> dist.ProcessGroup | None:
    """Return a group whose messages are those of CPU tensors, apart from all others."""
    if world.size == 1:
        return None

    def connect() -> dist.ProcessGroup:
        return cast(dist.ProcessGroup, dist.new_group(timeout=timedelta(seconds=world.timeout), backend="gloo"))

    return world.bounded("connecting to send weights", connect)


def _received(world: World, stages: int, own: Iterator[Entry], group: dist.ProcessGroup | None) -> Iterator[Entry]:
    yield from own
    for stage in range(1, stages):
        while True:
            with world.explained("receiving weights"):
                box: list[Any] = [None]
                dist.recv_object_list(box, stage, group)
                if box[0] is None:
                    break
                name, form, value = box[0]
                if form is not None:
                    value = torch.empty(form[1], dtype=form[0])
                    if value.numel():
                        dist.recv(value.view(-1).view(torch.uint8), stage, group)
            yield name, value
