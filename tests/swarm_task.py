"""A small task for tests of the swarm: layers with norms and dropout, so that versions and random states matter."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nesterov_pp.pipeline.recipe import find_recipe
from nesterov_pp.swarm.task import Task

ROWS, WIDTH = 4, 6


def _module(stage: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100 + stage)
        return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, WIDTH))


def _batch(microbatch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(microbatch)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    return x, x.cumsum(1).tanh()


def task(method: str, stages: int) -> Task:
    return Task(
        recipe=find_recipe(method).override({"correction_updates": 10}) if method == "swarm" else find_recipe(method),
        stages=stages,
        build=_module,
        loss_fn=F.mse_loss,
        batch=_batch,
        rate=lambda counted: 1e-2 / (1 + counted / 10),
        boundary=(ROWS, WIDTH),
        seed=3,
    )
