"""The time that runs would take with one device for each stage, simulated from layer times measured on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from nesterov_pp.methods.costs import of_step
from nesterov_pp.pipeline import Placement, Recipe
from nesterov_pp.planning import LayerCost, Network, measure_layers, simulate, stage_costs
from nesterov_pp.training.config import Config
from nesterov_pp.training.model import build_stages, next_token_loss

MODEL = ("layers", "width", "heads", "context", "batch", "vocab_size", "threads")
"""The settings of ``train`` that the time depends on."""

STORAGE = ("weights_dtype", "master_weights", "state_dtype")
"""The settings of ``train`` that the bytes of a parameter depend on."""


def measure_model(settings: Mapping[str, Any], recipe: Recipe, dtype: torch.dtype = torch.float32) -> list[LayerCost]:
    """Measure the layers of ``train``'s model with these ``MODEL`` settings, and the steps of the recipe's rule.

    ``dtype`` is that of the weights.
    """
    torch.set_num_threads(settings["threads"])
    sizes = {name: settings[name] for name in ("layers", "width", "heads", "context")}
    vocabulary = settings["vocab_size"]
    model = build_stages(vocabulary=vocabulary, stages=1, dropout=0.0, seed=0, **sizes)[0].to(dtype)
    tokens = torch.randint(vocabulary, (settings["batch"], settings["context"]))

    def rule(parameters: list[Tensor]) -> Optimizer:
        options = {**recipe.options, **recipe.stage_options(Placement(1, 1, 0))}
        built: Any = recipe.rule(parameters, lr=1e-3, **options)
        return cast("Optimizer", built)

    return measure_layers(list(model.children()), tokens, lambda logits: next_token_loss(logits, tokens), rule=rule)


def seconds_per_microbatch(
    settings: Mapping[str, Any], methods: Sequence[str], stages: int, **storage: Any
) -> dict[str, float]:
    """Return the time of a microbatch of each method in a pipeline of ``stages`` devices with an ideal network.

    Forwards and backwards are measured once for all methods. A method that waits for its gradients flushes for every
    update. Methods whose steps ``of_step`` does not count are left out. ``storage`` are settings named in ``STORAGE``.
    """
    found: dict[str, float] = {}
    first: list[LayerCost] = []
    for method in methods:
        config = Config(method=method, **storage)
        recipe = config.own_recipe
        if of_step(recipe) is None:
            continue
        layers = measure_model(settings, recipe, config.dtype)
        first = first or layers
        layers = [replace(shared, step=own.step) for shared, own in zip(first, layers, strict=True)]
        k = recipe.accumulation(stages)
        schedule = "async" if recipe.delayed else "gpipe"
        run, late = max(4 * stages, 32) * k, recipe.delays_of(stages, k).largest
        simulated = simulate(schedule, stage_costs(layers, stages), Network(), run, k, late, slack=recipe.slack)
        found[method] = simulated.seconds_per_microbatch
    return found
