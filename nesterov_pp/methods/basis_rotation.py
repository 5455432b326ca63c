"""Adam in an estimated eigenbasis (arXiv 2602.03515), with stashed weights."""

from __future__ import annotations

from dataclasses import replace

from nesterov_pp.optim.wrapped import StepsCopies
from nesterov_pp.pipeline.recipe import Recipe, register

BASIS_ROTATION = register(
    Recipe(
        name="basis-rotation",
        summary="Adam on late gradients in the eigenbasis of both gradient covariances (2nd, bi: the paper's fastest)",
        reference="arXiv 2602.03515",
        rule=StepsCopies,
        options={
            "base": "basis-rotation",
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0.01,
            "source": "2nd",
            "geometry": "bi",
            "refresh_every": 10,
        },
    )
)

BASIS_ROTATION_LIGHT = register(
    replace(
        BASIS_ROTATION,
        name="basis-rotation-1st-uni",
        summary="Adam on late gradients in the singular basis of the momentum's smaller side (1st, uni: least memory)",
        options={**BASIS_ROTATION.options, "source": "1st", "geometry": "uni"},
    )
)
