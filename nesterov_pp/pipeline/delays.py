"""When a stage's gradient is applied, and with which weights it was computed."""

from __future__ import annotations


def stage_delays(stages: int, microbatches_per_update: int = 1) -> list[int]:
    """Delay of each stage in updates, first stage first: ``tau_i = floor((2 (P - i) + 1) / (2 K))`` for i = 1 ... P.

    This is PipeDream's never-flushing schedule (one forward, one backward); the last stage has no delay.

    Raises:
        ValueError: ``stages`` or ``microbatches_per_update`` is below 1.
    """
    if stages < 1 or microbatches_per_update < 1:
        raise ValueError(
            f"stages and microbatches_per_update must be at least 1, not {stages} and {microbatches_per_update}"
        )
    return [(2 * (stages - i) + 1) // (2 * microbatches_per_update) for i in range(1, stages + 1)]


def version_for_update(update: int, delay: int, drained_at: int = 0) -> int:
    """The weight version that the microbatches of an update run with on a stage: ``max(drained_at, update - delay)``.

    ``drained_at`` is the update before which the pipeline was last empty (0: the start).
    """
    return max(drained_at, update - delay)
