"""The pipeline across processes: every stage runs in its own process, and no stage waits for a flush."""

from nesterov_pp.pipeline.distributed.links import Links
from nesterov_pp.pipeline.distributed.pipeline import AsyncPipeline
from nesterov_pp.pipeline.distributed.store import PipelineError
from nesterov_pp.pipeline.distributed.world import World, connect

__all__ = ["AsyncPipeline", "Links", "PipelineError", "World", "connect"]
