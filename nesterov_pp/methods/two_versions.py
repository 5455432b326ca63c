"""A delay of one update on every stage: two weight versions, updates of as many microbatches as there are stages."""

from __future__ import annotations

from dataclasses import replace

from nesterov_pp.methods.horizons import one_late_update
from nesterov_pp.methods.nesterov import NADAM
from nesterov_pp.methods.pipedream import ADAMW
from nesterov_pp.optim import AdamW, NAdam, Prediction
from nesterov_pp.optim.wrapped import StepsCopies
from nesterov_pp.pipeline.delay_models import Delays, Fixed
from nesterov_pp.pipeline.recipe import Recipe, register


def one_update_late(stages: int, _microbatches_per_update: int) -> Delays:
    """A delay of 1 on every stage; none where there is one stage only."""
    return Fixed([1 if stages > 1 else 0] * stages)


PIPEDREAM_2BW = register(
    Recipe(
        name="pipedream-2bw",
        summary="two versions: every gradient one update late, accumulated over P microbatches (AdamW)",
        reference="arXiv 2006.09503",
        rule=AdamW,
        options=ADAMW,
        microbatches_per_update=None,
        delays=one_update_late,
    )
)

# Feeding the last update back, x' = x - 2 u + (the u before), is the same sequence as predicting the next by repeating
# the last, w' = w - u and x' = w' - u: exact algebra, and the second version is there already.
ONE_STEP_EF = register(
    replace(
        PIPEDREAM_2BW,
        name="one-step-ef",
        summary="two versions, the last update fed back: forward at w + (the last displacement) (AdamW)",
        reference="arXiv 2606.30634",
        options={**ADAMW, "prediction": Prediction("displacement")},
        horizon=one_late_update,
        constant_delay=True,
    )
)

ONE_STEP_EF_NADAM = register(
    replace(
        ONE_STEP_EF,
        name="one-step-ef-nadam",
        summary="one-step-ef over NAdam with beta1 0.99",
        rule=NAdam,
        options={**NADAM, "prediction": Prediction("displacement")},
    )
)

ONE_STEP_EF_MUON = register(
    replace(
        ONE_STEP_EF,
        name="one-step-ef-muon",
        summary="one-step-ef over torch.optim.Muon for matrices, AdamW for the rest; plain torch",
        rule=StepsCopies,
        options={"base": "muon", "momentum": 0.95, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    )
)
