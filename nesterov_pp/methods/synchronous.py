"""Pipelines that wait for their gradients: no delay, at the price of idle stages (GPipe, arXiv 1811.06965)."""

from __future__ import annotations

from dataclasses import replace

from nesterov_pp.methods.pipedream import ADAMW
from nesterov_pp.optim import AdamW
from nesterov_pp.pipeline.recipe import Recipe, register

GPIPE = register(
    Recipe(
        name="gpipe",
        summary="synchronous: each update accumulates 4 microbatches (AdamW)",
        reference="arXiv 1811.06965",
        rule=AdamW,
        options=ADAMW,
        delayed=False,
        microbatches_per_update=4,
    )
)

GPIPE_1 = register(
    replace(
        GPIPE,
        name="gpipe-1",
        summary="synchronous with an update after every microbatch: no delay, no overlap",
        microbatches_per_update=1,
    )
)
