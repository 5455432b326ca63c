"""Pipelines: delays, partition, recipes, the virtual pipeline and the one across processes."""

from nesterov_pp.pipeline.asynchronous import AsyncPipeline
from nesterov_pp.pipeline.delays import stage_delays, version_for_update
from nesterov_pp.pipeline.partition import balanced_sizes, split_sequential
from nesterov_pp.pipeline.recipe import Placement, Recipe, find_recipe, recipes, register
from nesterov_pp.pipeline.stage import microbatch_seed
from nesterov_pp.pipeline.virtual import VirtualPipeline
from nesterov_pp.pipeline.world import PipelineError, World, connect

__all__ = [
    "AsyncPipeline",
    "PipelineError",
    "Placement",
    "Recipe",
    "VirtualPipeline",
    "World",
    "balanced_sizes",
    "connect",
    "find_recipe",
    "microbatch_seed",
    "recipes",
    "register",
    "split_sequential",
    "stage_delays",
    "version_for_update",
]
