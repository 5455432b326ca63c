"""The links between the processes of a run, measured with messages of their own."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from nesterov_pp.pipeline.distributed.world import World

_PINGS, _TRANSFERS, _SECONDS = 20, 8, 2.0
"""Messages of each kind, and seconds after which no more are begun."""


class Link(NamedTuple):
    """A link: seconds that a short message takes one way, and bytes a second of a long one."""

    latency: float = 0.0
    bandwidth: float = math.inf


def slowest_link(world: World, stages: int, size: int) -> Link:
    """Return the longest latency and the smallest bandwidth of the links between neighbouring stages, on every process.

    Process ``r stages + i`` is stage ``i`` of replica ``r``. Each time is the least of several, so that other work on
    the machines does not look like a slow link. Every process must call this.

    Args:
        world: the processes.
        stages: number of stages.
        size: bytes of a long message, at least 1.

    Raises:
        PipelineError: a process has ended, or does not respond in time.
    """
    stage, found = world.rank % stages, Link()
    with world.explained("measuring the links"):
        for first in (0, 1):  # every other link at once
            if stage % 2 == first and stage + 1 < stages:
                found = _asked(world.rank + 1, size)
            elif stage % 2 != first and stage > 0:
                _answered(world.rank - 1, size)
    links = world.gather(found)
    return Link(max(link.latency for link in links), min(link.bandwidth for link in links))


def _asked(other: int, size: int) -> Link:
    """Measure the link to a process that answers at the same time."""
    short = _least(other, torch.zeros(1, dtype=torch.uint8), _PINGS)
    long = _least(other, torch.zeros(size, dtype=torch.uint8), _TRANSFERS)
    return Link(short / 2, 2 * size / (long - short) if long > short else math.inf)


def _least(other: int, content: Tensor, times: int) -> float:
    """Return the least time of a message and its return. The first byte says whether it is the last."""
    least, begin = math.inf, time.perf_counter()
    for k in range(times):
        last = k == times - 1 or time.perf_counter() - begin > _SECONDS
        content[0] = last
        sent = time.perf_counter()
        dist.send(content, other)
        dist.recv(content, other)
        least = min(least, time.perf_counter() - sent)
        if last:
            break
    return least


def _answered(other: int, size: int) -> None:
    for length in (1, size):
        content = torch.zeros(length, dtype=torch.uint8)
        while not content[0]:
            dist.recv(content, other)
            dist.send(content, other)
