"""Pipelines: delay models, partitioning, recipes, and the virtual and the distributed pipeline."""

from nesterov_pp.pipeline.batches import Batches
from nesterov_pp.pipeline.cutting import StageModule, cut, load_weights
from nesterov_pp.pipeline.delay_models import (
    Delays,
    DropOuts,
    Fixed,
    Geometric,
    LocalAccumulation,
    Stragglers,
    Trace,
    Uniform,
    stage_delays,
    version_for_update,
)
from nesterov_pp.pipeline.distributed import AsyncPipeline, Links, PipelineError, World, connect
from nesterov_pp.pipeline.groups import no_decay
from nesterov_pp.pipeline.losses import causal_lm_loss
from nesterov_pp.pipeline.partition import balanced_sizes, split_sequential
from nesterov_pp.pipeline.recipe import Placement, Recipe, find_recipe, recipes, register
from nesterov_pp.pipeline.stage import ParamGroups, microbatch_seed
from nesterov_pp.pipeline.swarm import Swarm
from nesterov_pp.pipeline.virtual import VirtualPipeline
from nesterov_pp.pipeline.workers import VirtualWorkers

__all__ = [
    "AsyncPipeline",
    "Batches",
    "Delays",
    "DropOuts",
    "Fixed",
    "Geometric",
    "Links",
    "LocalAccumulation",
    "ParamGroups",
    "PipelineError",
    "Placement",
    "Recipe",
    "StageModule",
    "Stragglers",
    "Swarm",
    "Trace",
    "Uniform",
    "VirtualPipeline",
    "VirtualWorkers",
    "World",
    "balanced_sizes",
    "causal_lm_loss",
    "connect",
    "cut",
    "find_recipe",
    "load_weights",
    "microbatch_seed",
    "no_decay",
    "recipes",
    "register",
    "split_sequential",
    "stage_delays",
    "version_for_update",
]
