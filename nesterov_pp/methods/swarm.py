"""The paper's method without a stash, on stages that are teams of unequal, unreliable workers."""

from __future__ import annotations

from dataclasses import replace

from nesterov_pp.methods.nesterov import NESTEROV_NO_STASH
from nesterov_pp.pipeline.delay_models import Delays
from nesterov_pp.pipeline.recipe import register
from nesterov_pp.pipeline.swarm import Swarm


def three_a_stage(stages: int, _microbatches_per_update: int) -> Delays:
    """Return a swarm with three workers per stage, of speeds 1, 0.7 and 0.4, and 2 P microbatches in flight.

    The two slower workers are present for 300 units of time and absent for 60 on average.
    """
    return Swarm(((1.0, 0.7, 0.4),) * stages, in_flight=2 * stages, cut=4 * stages, mean_up=300.0, mean_down=60.0)


SWARM = register(
    replace(
        NESTEROV_NO_STASH,
        name="swarm",
        summary="nesterov-no-stash with stochastic wiring: 3 unequal workers per stage that come and go",
        reference="arXiv 2301.11913, asynchronous; with arXiv 2505.01099, Eq. 13",
        delays=three_a_stage,
        distributed=False,
    )
)
