"""The order of events on one stage of a pipeline that does not flush."""

from __future__ import annotations


def drained_before(update: int, flush_every: int | None, synchronous_updates: int = 0) -> int:
    """Return the last update up to ``update`` before which the pipeline was empty (0: the start).

    The pipeline is empty before each of the first ``synchronous_updates`` updates, and before the one after them.
    """
    drained = 0 if flush_every is None else update // flush_every * flush_every
    return max(drained, min(update, synchronous_updates))


def forward_limit(
    microbatch: int, *, ahead: int, delay: int, microbatches_per_update: int, flush_every: int | None, stop: int
) -> int:
    """Return the last microbatch whose forward a stage runs before the backward of ``microbatch``.

    The schedule is one forward, one backward, ``ahead`` microbatches apart (PipeDream, arXiv 1806.03377). A
    forward is held back while the weights that it needs do not exist yet: the microbatches of update ``t`` run with
    version ``t - delay``, and at a drain nothing of the next segment starts before all of this segment is done. With
    ``delay`` 0 and K microbatches per update this is 1F1B with a flush after every K.

    Args:
        microbatch: the microbatch, counted from 0.
        ahead: number of forwards by which the stage may be ahead of its backwards (``forwards_ahead``).
        delay: the stage's tau, in updates.
        microbatches_per_update: K.
        flush_every: updates between drains; None for never.
        stop: number of microbatches in the whole run.
    """
    k = microbatches_per_update
    update = microbatch // k
    limit = min(microbatch + ahead, (update + delay + 1) * k - 1, stop - 1)
    if flush_every is not None:
        limit = min(limit, (drained_before(update, flush_every) + flush_every) * k - 1)
    return limit
