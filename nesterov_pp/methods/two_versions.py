"""Methods with a delay of one update on every stage, two weight versions and P microbatches per update."""

from __future__ import annotations

from dataclasses import replace

from nesterov_pp.methods.horizons import one_late_update
from nesterov_pp.methods.nesterov import NADAM
from nesterov_pp.methods.pipedream import ADAMW
from nesterov_pp.optim import AdamW, NAdam, Prediction
from nesterov_pp.optim.wrapped import StepsCopies
from nesterov_pp.pipeline.delay_models import Delays, Fixed
from nesterov_pp.pipeline.recipe import Recipe, register

MUON = {"base": "muon", "momentum": 0.95, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def one_update_late(stages: int, _microbatches_per_update: int) -> Delays:
    """Return a delay of 1 on every stage; 0 if there is only one stage."""
    return Fixed([1 if stages > 1 else 0] * stages)


PIPEDREAM_2BW = register(
    Recipe(
        name="pipedream-2bw",
        summary="two versions: every gradient is one update late, accumulated over P microbatches (AdamW)",
        reference="arXiv 2006.09503",
        rule=AdamW,
        options=ADAMW,
        microbatches_per_update=None,
        delays=one_update_late,
    )
)

# Feeding the last update back, x' = x - 2 u + (the previous u), gives the same sequence as predicting the next update
# by repeating the last, w' = w - u and x' = w' - u. The algebra is exact, and the second version exists already.
ONE_STEP_EF = register(
    replace(
        PIPEDREAM_2BW,
        name="one-step-ef",
        summary="two versions with the last update fed back: forward at w + (the last displacement) (AdamW)",
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
        summary="one-step-ef with NAdam (beta1 0.99)",
        rule=NAdam,
        options={**NADAM, "prediction": Prediction("displacement")},
    )
)

ONE_STEP_EF_MUON = register(
    replace(
        ONE_STEP_EF,
        name="one-step-ef-muon",
        summary="one-step-ef with torch.optim.Muon for matrices and AdamW for the rest; plain torch",
        rule=StepsCopies,
        options=MUON,
    )
)
