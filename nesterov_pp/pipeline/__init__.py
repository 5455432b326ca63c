"""Pipelines: delays, partition, recipes, and the virtual pipeline."""

from nesterov_pp.pipeline.delays import stage_delays, version_for_update
from nesterov_pp.pipeline.partition import balanced_sizes, split_sequential
from nesterov_pp.pipeline.recipe import Placement, Recipe, find_recipe, recipes, register
from nesterov_pp.pipeline.stage import microbatch_seed
from nesterov_pp.pipeline.virtual import VirtualPipeline

__all__ = [
    "Placement",
    "Recipe",
    "VirtualPipeline",
    "balanced_sizes",
    "find_recipe",
    "microbatch_seed",
    "recipes",
    "register",
    "split_sequential",
    "stage_delays",
    "version_for_update",
]
