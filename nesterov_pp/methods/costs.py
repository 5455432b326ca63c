"""What a recipe costs on a stage of a real pipeline."""

from __future__ import annotations

from nesterov_pp.kernels import Normaliser
from nesterov_pp.optim import FusedOptimizer, costs
from nesterov_pp.pipeline.recipe import Recipe


def of_step(recipe: Recipe) -> costs.Cost | None:
    """Bytes per parameter of the recipe's one-pass step; None where the step is no single pass."""
    if not (isinstance(recipe.rule, type) and issubclass(recipe.rule, FusedOptimizer)) or recipe.forecast is not None:
        return None
    return costs.one_pass(
        adaptive=recipe.rule._normaliser == Normaliser.RMS,
        correction=recipe.options.get("correction"),
        prediction=recipe.options.get("prediction"),
    )


def extra_versions(recipe: Recipe) -> str:
    """How many versions of its weights stage i of P keeps besides the newest, and besides a copy that is predicted."""
    if not recipe.delayed or recipe.backward != "stashed":
        return "none"
    if recipe.microbatches_per_update is None:
        return "1"
    k = recipe.microbatches_per_update
    return "P - i" if k == 1 else f"(P - i) / {k}"


def delays_taken(recipe: Recipe) -> str:
    """What the recipe makes of a delay that changes."""
    if not recipe.delayed:
        return "none"
    return "constant" if recipe.constant_delay else "any"
