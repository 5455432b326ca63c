"""The paper's look-ahead in an eigenbasis (arXiv 2505.01099 in the basis of arXiv 2602.03515), with stashed weights."""

from __future__ import annotations

from dataclasses import replace

from nesterov_pp.optim import RotatedAdamW, RotatedNAdam
from nesterov_pp.pipeline.recipe import Recipe, register

ROTATED_ADAMW = {
    "betas": (0.9, 0.99),
    "eps": 1e-8,
    "weight_decay": 0.01,
    "refresh_every": 20,
    "block_size": 64,
    "covariance_every": 4,
}
ROTATED_NADAM = {**ROTATED_ADAMW, "betas": (0.99, 0.99), "momentum_decay": 0.004}

NESTEROV_ROTATED = register(
    Recipe(
        name="nesterov-rotated",
        summary="nesterov's look-ahead (NAdam, beta1 0.99) in the eigenbasis of both gradient covariances",
        reference="this project (arXiv 2505.01099, Eq. 10, in the basis of arXiv 2602.03515)",
        rule=RotatedNAdam,
        options=ROTATED_NADAM,
    )
)

PIPEDREAM_ROTATED = register(
    replace(
        NESTEROV_ROTATED,
        name="pipedream-rotated",
        summary="AdamW in the eigenbasis of both gradient covariances, on late gradients as they come",
        reference="arXiv 2602.03515",
        rule=RotatedAdamW,
        options=ROTATED_ADAMW,
    )
)
