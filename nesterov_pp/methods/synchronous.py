"""Pipelines that wait for their gradients: no delay, at the price of idle stages (GPipe, arXiv 1811.06965)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from nesterov_pp.methods.nesterov import NADAM
from nesterov_pp.methods.pipedream import ADAMW
from nesterov_pp.methods.rotated import ROTATED_ADAMW, ROTATED_NADAM
from nesterov_pp.methods.two_versions import MUON
from nesterov_pp.optim import AdamW, NAdam, RotatedAdamW, RotatedNAdam
from nesterov_pp.optim.wrapped import StepsCopies
from nesterov_pp.pipeline.recipe import Recipe, StageOptimizer, register

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


def _with_rule(
    name: str, what: str, rule: Callable[..., StageOptimizer], options: Mapping[str, Any]
) -> tuple[Recipe, Recipe]:
    """Register both synchronous recipes with another rule, to compare a delayed method of that rule with."""
    waiting, undelayed = (
        register(
            replace(
                recipe,
                name=f"{recipe.name}-{name}",
                summary=f"{recipe.summary.removesuffix(' (AdamW)')} ({what})",
                rule=rule,
                options=options,
            )
        )
        for recipe in (GPIPE, GPIPE_1)
    )
    return waiting, undelayed


GPIPE_NADAM, GPIPE_1_NADAM = _with_rule("nadam", "NAdam, beta1 0.99", NAdam, NADAM)
GPIPE_ROTATED, GPIPE_1_ROTATED = _with_rule("rotated", "rotated AdamW", RotatedAdamW, ROTATED_ADAMW)
GPIPE_ROTATED_NADAM, GPIPE_1_ROTATED_NADAM = _with_rule(
    "rotated-nadam", "rotated NAdam, beta1 0.99", RotatedNAdam, ROTATED_NADAM
)
GPIPE_MUON, GPIPE_1_MUON = _with_rule("muon", "Muon", StepsCopies, MUON)
