"""The order of events on one stage of a pipeline that does not flush."""

from __future__ import annotations


def drained_before(update: int, flush_every: int | None, synchronous_updates: int = 0) -> int:
    """The last update up to ``update`` before which the pipeline was empty (0: the start).

    Before each of the first ``synchronous_updates`` it was, and before the one after them.
    """
    drained = 0 if flush_every is None else update // flush_every * flush_every
    return max(drained, min(update, synchronous_updates))


def forward_limit(
    microbatch: int, *, ahead: int, delay: int, microbatches_per_update: int, flush_every: int | None, stop: int
) -> int:
    """The last microbatch whose forward a stage runs before the backward of ``microbatch``.

    One forward, one backward, ``ahead = P - i`` microbatches apart (PipeDream, arXiv 1806.03377), held back where a
    forward needs weights that are not there yet: those of update ``t`` run with version ``t - delay``, and after a
    drain nothing starts before all of the segment is done. With ``delay`` 0 and K microbatches an update this is
    1F1B with a flush after every K.

    Args:
        microbatch: counted from 0, as ``stop`` is.
        ahead: forwards that stage i of P may be ahead of its backwards, ``P - i``.
        delay: the stage's tau, in updates.
        microbatches_per_update: K.
        flush_every: updates between drains; None for never.
        stop: microbatches of the whole run.
    """
    k = microbatches_per_update
    update = microbatch // k
    limit = min(microbatch + ahead, (update + delay + 1) * k - 1, stop - 1)
    if flush_every is not None:
        limit = min(limit, (drained_before(update, flush_every) + flush_every) * k - 1)
    return limit
