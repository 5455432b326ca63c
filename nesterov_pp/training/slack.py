"""The slack that a run on slow links needs, from links and computing times that its processes measure and share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nesterov_pp.pipeline import World
from nesterov_pp.pipeline.distributed.measured import Link, slowest_link
from nesterov_pp.pipeline.wire import message_bytes
from nesterov_pp.planning import Network, StageCost, least_slack, stage_costs
from nesterov_pp.training.config import Config
from nesterov_pp.training.pace import MODEL, measure_model

SLOW = 1e-3
"""Seconds of latency from which on a run chooses its slack unasked. Within a machine it is a tenth of that."""

MOST = 10_000
_SHORTEST, _LONGEST = 1 << 16, 1 << 22


def automatic_slack(world: World, replicas: int, config: Config, *, asked: bool) -> tuple[int, str]:
    """Return the least slack that hides the links, the same on every process, and a sentence about it ("" for none).

    The links of the run are measured. If they are slow, or the slack was ``asked`` for, each process measures the
    layers of the model, and ``planning.least_slack`` chooses for the slowest process of each stage and the slowest of
    the links.

    Raises:
        PipelineError: a process has ended, or does not respond in time.
    """
    recipe, stages = config.recipe, world.size // replicas
    if stages == 1 or recipe.slack or not recipe.takes_slack:
        return 0, ""
    rows, itemsize = config.batch * config.context * config.width, config.dtype.itemsize
    size = message_bytes(rows * itemsize, config.dtype, config.wire)
    link = slowest_link(world, stages, min(max(size, _SHORTEST), _LONGEST))
    if not asked and link.latency < SLOW:
        return 0, ""
    settings = {name: getattr(config, name) for name in MODEL}
    with torch.random.fork_rng(devices=[]):
        layers = measure_model(settings, config.own_recipe, config.dtype)
    own = stage_costs(layers, stages)[world.rank % stages]
    found = world.gather(own)
    costs = [max(found[s::stages], key=lambda cost: cost.forward + cost.backward) for s in range(stages)]
    costs = [replace(cost, message_bytes=size) for cost in costs]
    # One process decides, should arithmetic differ between machines.
    slack = world.agreed(lambda: _chosen(costs, link, recipe.accumulation(stages), recipe.linearise_at == "version"))
    return slack, (
        f"Slack {slack}, for links of {1e3 * link.latency:.3g} ms and {link.bandwidth * 8e-6:,.0f} Mbit/s and "
        f"{1e3 * max(c.forward + c.backward + c.step for c in costs):.3g} ms a microbatch; --slack N sets another."
    )


def _chosen(costs: Sequence[StageCost], link: Link, per_update: int, stash: bool) -> int:
    return min(MOST, least_slack(costs, Network(*link), per_update, stash=stash))
