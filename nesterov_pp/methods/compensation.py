"""Methods that correct late gradients by how far the weights have moved since, or apply them at a smaller rate."""

from __future__ import annotations

from dataclasses import replace

from nesterov_pp.methods.pipedream import PIPEDREAM, PIPEDREAM_LR
from nesterov_pp.methods.rates import one_over_delay
from nesterov_pp.optim import DelayCompensation, GapAware
from nesterov_pp.pipeline.recipe import register

STALENESS_AWARE = register(
    replace(
        PIPEDREAM,
        name="staleness-aware",
        summary="pipedream with the learning rate divided by the delay",
        reference="arXiv 1511.05950 (recalled)",
        lr_factor=one_over_delay,
    )
)

DC_ASGD = register(
    replace(
        PIPEDREAM,
        name="dc-asgd",
        summary="pipedream with g + 0.04 g g (w - w_stash) for g; for the adaptive form give "
        "correction=DelayCompensation(2.0, adaptive=True)",
        reference="arXiv 1609.08326 (there with SGD)",
        options={**PIPEDREAM.options, "correction": DelayCompensation()},
    )
)

GAP_AWARE = register(
    replace(
        PIPEDREAM,
        name="gap-aware",
        summary="pipedream with each element's gradient divided by 1 + |w - w_stash| / (size of an update)",
        reference="arXiv 1909.10802",
        options={**PIPEDREAM.options, "correction": GapAware()},
    )
)

LR_SECOND_ORDER = register(
    replace(
        PIPEDREAM_LR,
        name="lr-second-order",
        summary="pipedream-lr with g + 0.04 g g (w - w_stash) for g",
        reference="arXiv 2505.01099, section 5 (from the flags of its code; the term itself is not released)",
        options={**PIPEDREAM.options, "correction": DelayCompensation()},
    )
)
