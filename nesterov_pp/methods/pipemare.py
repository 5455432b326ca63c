"""PipeMare (arXiv 1910.05124): no stash, learning rate by delay, backward at estimated weights, synchronous start."""

from __future__ import annotations

from nesterov_pp.methods.horizons import over_the_delay
from nesterov_pp.methods.pipedream import ADAMW
from nesterov_pp.methods.rates import CORRECTION_UPDATES, discount_by_delay
from nesterov_pp.optim import AdamW, Discrepancy
from nesterov_pp.pipeline.recipe import Recipe, register

PIPEMARE = register(
    Recipe(
        name="pipemare",
        summary="no stash: learning rate by delay (T1), backward at estimated weights (T2), synchronous start "
        "(T3: synchronous_updates) (AdamW)",
        reference="arXiv 1910.05124 (recalled; T1 as in the code of 2505.01099)",
        rule=AdamW,
        options={**ADAMW, "prediction": Discrepancy()},
        linearise_at="shadow",
        lr_factor=discount_by_delay,
        correction_updates=CORRECTION_UPDATES,
        horizon=over_the_delay,
        synchronous_updates=0,
        constant_delay=True,
    )
)
