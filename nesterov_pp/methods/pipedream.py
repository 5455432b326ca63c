"""PipeDream (arXiv 1806.03377): late gradients at stashed weights, uncorrected or with a smaller rate."""

from __future__ import annotations

from dataclasses import replace

from nesterov_pp.methods.rates import CORRECTION_UPDATES, discount_by_delay
from nesterov_pp.optim import AdamW
from nesterov_pp.pipeline.recipe import Recipe, register

ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
"""Hyper-parameters of the base optimizer of every method that is compared with the paper's."""

PIPEDREAM = register(
    Recipe(
        name="pipedream",
        summary="late gradients at stashed weights, applied as they are (AdamW)",
        reference="arXiv 1806.03377",
        rule=AdamW,
        options=ADAMW,
    )
)

PIPEDREAM_LR = register(
    replace(
        PIPEDREAM,
        name="pipedream-lr",
        summary="pipedream with the learning rate divided by the delay early in training",
        reference="arXiv 2505.01099, Eq. 13; arXiv 1910.05124, T1",
        lr_factor=discount_by_delay,
        correction_updates=CORRECTION_UPDATES,
    )
)
