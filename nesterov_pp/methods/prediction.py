"""Methods that run forward and backward at predicted weights."""

from __future__ import annotations

from dataclasses import replace

from nesterov_pp.methods.horizons import over_the_delay
from nesterov_pp.methods.pipedream import ADAMW
from nesterov_pp.optim import NAG, AdamW, Prediction
from nesterov_pp.pipeline.recipe import Recipe, register

XPIPE = register(
    Recipe(
        name="xpipe",
        summary="weights predicted over the delay along Adam's direction (AdamW)",
        reference="arXiv 1911.04610 (distance recalled)",
        rule=AdamW,
        options={**ADAMW, "prediction": Prediction("momentum")},
        horizon=over_the_delay,
        constant_delay=True,
    )
)

SPECTRAIN = register(
    Recipe(
        name="spectrain",
        summary="weights predicted over the delay along the momentum (SGD); one prediction for forward and backward",
        reference="arXiv 1809.02839",
        rule=NAG,
        options={"momentum": 0.9, "weight_decay": 0.0, "prediction": Prediction("momentum")},
        horizon=over_the_delay,
        constant_delay=True,
    )
)

LWP = register(
    replace(
        XPIPE,
        name="lwp",
        summary="weights predicted over the delay by repeating the last displacement (AdamW)",
        reference="arXiv 2003.11666, weight form (recalled)",
        options={**ADAMW, "prediction": Prediction("displacement")},
    )
)
