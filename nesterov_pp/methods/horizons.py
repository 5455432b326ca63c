"""Horizons: how far ahead a stage looks, in updates."""

from __future__ import annotations

from nesterov_pp.pipeline.recipe import Placement


def over_the_delay(place: Placement, _update: int, _correction_updates: int) -> float:
    """Return the stage's delay: as far as the weights move until the gradient is applied."""
    return float(place.delay)


def growing_to_the_delay(place: Placement, update: int, correction_updates: int) -> float:
    """Return a horizon that grows from 1, the paper's look-ahead, to the stage's delay.

    For update ``t`` it is ``1 + (tau - 1) min(t / T, 1)``.
    """
    return 1.0 + max(0, place.delay - 1) * min(update / correction_updates, 1.0)


def one_update(_place: Placement, _update: int, _correction_updates: int) -> float:
    """Return 1, the next update alone."""
    return 1.0


def one_late_update(place: Placement, _update: int, _correction_updates: int) -> float:
    """Return 1, the next update, or 0 on a stage whose gradient is not late."""
    return float(min(place.delay, 1))
