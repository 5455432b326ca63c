"""Methods that control weight versions by gradient accumulation."""

from __future__ import annotations

from dataclasses import replace

from nesterov_pp.methods.pipedream import PIPEDREAM
from nesterov_pp.pipeline.delay_models import LocalAccumulation
from nesterov_pp.pipeline.recipe import register

PACI = register(
    replace(
        PIPEDREAM,
        name="paci",
        summary="no stash: each stage updates after every 8 backwards, whatever their versions (AdamW, beta2 0.95)",
        reference="arXiv 2606.07881",
        options={**PIPEDREAM.options, "betas": (0.9, 0.95), "weight_decay": 0.1},
        linearise_at="newest",
        microbatches_per_update=8,
        delays=LocalAccumulation,
        distributed=False,
    )
)

GBA = register(
    replace(
        PIPEDREAM,
        name="gba",
        summary="one update per 4 microbatches, of which those more than max_staleness updates late count as zero",
        reference="arXiv 2205.11048 (abstract; mechanism recalled)",
        microbatches_per_update=4,
        max_staleness=4,
        distributed=False,
    )
)
