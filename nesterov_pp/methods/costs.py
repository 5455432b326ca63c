"""The counted costs of a recipe on a stage of a real pipeline: bytes per parameter, and versions kept."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nesterov_pp.kernels import Normaliser
from nesterov_pp.kernels.codes import GROUP
from nesterov_pp.optim import DelayCompensation, Discrepancy, FusedOptimizer, GapAware, Prediction
from nesterov_pp.optim.options import LOW_PRECISION, SPLIT
from nesterov_pp.optim.rotated import RotatedOptimizer
from nesterov_pp.pipeline.recipe import Recipe

_EIGHT_BIT_MOMENT = 1 + torch.float16.itemsize / GROUP


class Cost(NamedTuple):
    """Bytes per parameter: ``state`` besides the ring's weights and the gradient, and ``traffic`` of one step.

    The traffic of a step with matrix products, which is no single pass, is None.
    """

    state: float
    traffic: float | None


def one_pass(
    *,
    adaptive: bool,
    correction: DelayCompensation | GapAware | None = None,
    prediction: Prediction | Discrepancy | None = None,
    weights: torch.dtype = torch.float32,
    state_dtype: torch.dtype | str | None = None,
    master_weights: bool | str = False,
) -> Cost:
    """Return the cost of the one-pass step, counting once every tensor that the step reads or writes.

    A plain step reads weights, gradient and moments and writes weights and moments: in float32, 28 bytes with two
    moments, 20 with one. A correction reads the weights of the gradient; a running mean is read and written; a
    prediction is written. With masters, these are read instead of the weights, and both are written; with weights in 24
    bits, weights and residuals are both read and written. A moment in eight bits is a byte and a 32nd of a scale.

    Args:
        adaptive: whether the rule has a second moment.
        correction, prediction, state_dtype, master_weights: as for ``NAdam``.
        weights: dtype of the weights in the ring, and of the gradients.
    """
    size = weights.itemsize
    low = weights in LOW_PRECISION
    master = torch.float32.itemsize if master_weights is True and low else 0
    residual = 1 if master_weights == SPLIT and low else 0
    wide = torch.float32.itemsize if master or residual else size
    moment: float = wide if state_dtype is None else _EIGHT_BIT_MOMENT
    if isinstance(state_dtype, torch.dtype):
        moment = state_dtype.itemsize
    moments = 2 if adaptive else 1
    has_mean = (correction is not None and correction.mean_name is not None) or isinstance(prediction, Discrepancy)
    state = (moments + has_mean) * moment + (prediction is not None) * size + master + residual
    passed = (master or size) + 2 * size + master + 2 * residual  # weights, gradient, next weights, both weights' rest
    late = (correction is not None) + (prediction is not None)
    return Cost(state, passed + 2 * (moments + has_mean) * moment + late * size)


def of_step(recipe: Recipe, weights: torch.dtype = torch.float32) -> Cost | None:
    """Return the cost of the recipe's step; None if it is neither a single pass nor a rotated one.

    ``weights`` is the dtype of the weights in the ring; that of the state, and masters, are options of the recipe.
    Rotated rules keep two moments for each number of a square block, and four numbers of covariances and bases, in
    float32 at least.
    """
    if not isinstance(recipe.rule, type) or recipe.forecast is not None:
        return None
    stored = {name: recipe.options[name] for name in ("state_dtype", "master_weights") if name in recipe.options}
    if issubclass(recipe.rule, RotatedOptimizer):
        wide = torch.promote_types(weights, torch.float32).itemsize
        has_master = stored.get("master_weights", False) and weights in LOW_PRECISION
        return Cost(wide * (2 + 4 + has_master), None)
    if not issubclass(recipe.rule, FusedOptimizer):
        return None
    return one_pass(
        adaptive=recipe.rule._normaliser == Normaliser.RMS,
        correction=recipe.options.get("correction"),
        prediction=recipe.options.get("prediction"),
        weights=weights,
        **stored,
    )


def extra_versions(recipe: Recipe) -> str:
    """Return how many weight versions stage i of P keeps besides the newest, not counting a predicted copy."""
    if not recipe.delayed or recipe.linearise_at != "version":
        return "none"
    if recipe.microbatches_per_update is None:
        return "1"
    k = recipe.microbatches_per_update
    return "P - i" if k == 1 else f"(P - i) / {k}"


def delays_taken(recipe: Recipe) -> str:
    """Return which delays the recipe takes: "none", "constant" ones only, or "any", including ones that change."""
    if not recipe.delayed:
        return "none"
    return "constant" if recipe.constant_delay else "any"
