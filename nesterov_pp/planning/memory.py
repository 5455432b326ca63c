"""The memory of each stage of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from nesterov_pp.pipeline.delay_models import forwards_ahead, stage_delays
from nesterov_pp.planning.layers import StageCost
from nesterov_pp.stash import OldVersions, ring_bytes


def memory_per_stage(
    schedule: str,
    costs: Sequence[StageCost],
    per_update: int = 1,
    *,
    stash: bool = True,
    old_versions: OldVersions = "full",
    buffer: bool = False,
    itemsize: int = 4,
    state: float = 2.0,
    delays: Sequence[int] | None = None,
    slack: int = 0,
) -> list[int]:
    """Return the bytes of each stage: weight versions, gradients, state, activations of microbatches in flight.

    ``old_versions`` is the form of versions older than the newest, for weights of ``itemsize`` bytes, and ``buffer``
    says whether one of them is also decoded as a whole (``Recipe.decodes_whole_versions``). ``state`` is the
    size of the optimizer's state (moments, masters, a predicted copy) as a multiple of one version of
    the weights: 2 for two moments of their dtype, 6 for bfloat16 weights with two moments and a master in float32.

    With ``delays`` tau (default: those of ``stage_delays``), "async" keeps ``tau + 1`` versions (one without a stash)
    and the activations of up to ``P - i + 1`` microbatches, and of more with a ``slack`` (``forwards_ahead``). "gpipe"
    keeps the activations of all ``per_update`` microbatches, "1f1b" those of ``min(per_update, P - i + 1)``. Buffers
    that libraries allocate are not counted.
    """
    stages = len(costs)
    if schedule != "async":
        delays = [0] * stages
    elif delays is None:
        delays = stage_delays(stages, per_update, slack)
    rings = [ring_bytes(old_versions, tau + 1 if stash else 1, itemsize, buffer=buffer) / itemsize for tau in delays]
    in_flight = [ahead + 1 for ahead in forwards_ahead(stages, slack if schedule == "async" else 0)]
    if schedule == "1f1b":
        in_flight = [min(per_update, n) for n in in_flight]
    if schedule == "gpipe":
        in_flight = [per_update] * stages
    return [
        round(c.weight_bytes * (ring + 1 + state)) + n * c.activation_bytes
        for c, ring, n in zip(costs, rings, in_flight, strict=True)
    ]
