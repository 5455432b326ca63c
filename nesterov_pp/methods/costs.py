"""The counted costs of a recipe on a stage of a real pipeline: bytes per float32 parameter, and versions kept."""

from __future__ import annotations

from typing import NamedTuple

from nesterov_pp.kernels import Normaliser
from nesterov_pp.optim import DelayCompensation, Discrepancy, FusedOptimizer, GapAware, Prediction
from nesterov_pp.optim.rotated import RotatedOptimizer
from nesterov_pp.pipeline.recipe import Recipe

_BYTES = 4


class Cost(NamedTuple):
    """Bytes per parameter: ``state`` besides the ring's weights and the gradient, and ``traffic`` of one step.

    The traffic of a step with matrix products, which is no single pass, is None.
    """

    state: int
    traffic: int | None


def one_pass(
    *,
    adaptive: bool,
    correction: DelayCompensation | GapAware | None = None,
    prediction: Prediction | Discrepancy | None = None,
) -> Cost:
    """Return the cost of the one-pass step, counting once every tensor that the step reads or writes.

    A plain step reads weights, gradient and moments and writes weights and moments: 28 bytes with two moments, 20 with
    one. A correction reads the weights of the gradient; a running mean is read and written; a prediction is written.
    """
    moments = 2 if adaptive else 1
    has_mean = (correction is not None and correction.mean_name is not None) or isinstance(prediction, Discrepancy)
    state = moments + has_mean + (prediction is not None)
    traffic = 3 + 2 * moments + (correction is not None) + 2 * has_mean + (prediction is not None)
    return Cost(_BYTES * state, _BYTES * traffic)


def of_step(recipe: Recipe) -> Cost | None:
    """Return the cost of the recipe's step; None if it is neither a single pass nor a rotated one.

    Rotated rules keep two moments for each number of a square block, and four numbers of covariances and bases.
    """
    if not isinstance(recipe.rule, type) or recipe.forecast is not None:
        return None
    if issubclass(recipe.rule, RotatedOptimizer):
        return Cost(_BYTES * (2 + 4), None)
    if not issubclass(recipe.rule, FusedOptimizer):
        return None
    return one_pass(
        adaptive=recipe.rule._normaliser == Normaliser.RMS,
        correction=recipe.options.get("correction"),
        prediction=recipe.options.get("prediction"),
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
