"""The paper's methods (arXiv 2505.01099), and a look-ahead that reaches over the delay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nesterov_pp.methods.horizons import growing_to_the_delay
from nesterov_pp.methods.rates import CORRECTION_UPDATES, discount_by_delay
from nesterov_pp.optim import NAG, NAdam
from nesterov_pp.pipeline.recipe import Placement, Recipe, register

NADAM = {
    "betas": (0.99, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.01,
    "momentum_decay": 0.004,
    "decoupled_weight_decay": True,
}

NESTEROV = register(
    Recipe(
        name="nesterov",
        summary="discounted Nesterov look-ahead (NAdam, beta1 0.99) with stashed weights",
        reference="arXiv 2505.01099, Eq. 10",
        rule=NAdam,
        options=NADAM,
    )
)


def _momentum_by_stage(place: Placement) -> dict[str, Any]:
    """Return beta1 of Eq. 13, ``gamma_i = 0.9 + 0.09 (P - i) / P``: the later the gradient, the larger beta1."""
    return {"betas": (0.9 + 0.09 * (place.stages - place.stage) / place.stages, 0.999)}


NESTEROV_NO_STASH = register(
    Recipe(
        name="nesterov-no-stash",
        summary="nesterov without a stash: backward at the current weights, momentum and learning rate by stage",
        reference="arXiv 2505.01099, Eq. 13",
        rule=NAdam,
        options={k: v for k, v in NADAM.items() if k != "betas"},
        linearise_at="newest",
        stage_options=_momentum_by_stage,
        lr_factor=discount_by_delay,
        correction_updates=CORRECTION_UPDATES,
    )
)

NESTEROV_SGD = register(
    Recipe(
        name="nesterov-sgd",
        summary="discounted Nesterov look-ahead without a preconditioner (SGD), with stashed weights",
        reference="arXiv 2505.01099, Eq. 10",
        rule=NAG,
        options={"momentum": 0.99, "weight_decay": 0.0},
    )
)

# A full horizon from the start did worse than none in a short run, so it grows over correction_updates.
NESTEROV_HORIZON = register(
    replace(
        NESTEROV,
        name="nesterov-horizon",
        summary="nesterov with a look-ahead that grows from one update to the stage's delay",
        reference="this project (Eq. 10 of arXiv 2505.01099, looking further ahead)",
        correction_updates=CORRECTION_UPDATES,
        horizon=growing_to_the_delay,
        constant_delay=True,
    )
)
