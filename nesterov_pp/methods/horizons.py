"""How far ahead a stage looks, in updates."""

from __future__ import annotations

from nesterov_pp.pipeline.recipe import Placement


def over_the_delay(place: Placement, _update: int, _correction_updates: int) -> float:
    """The stage's delay: as far as the weights move until the gradient is applied."""
    return float(place.delay)


def growing_to_the_delay(place: Placement, update: int, correction_updates: int) -> float:
    """From 1, the paper's look-ahead, to the stage's delay: ``1 + (tau - 1) min(t / T, 1)`` for update ``t``."""
    return 1.0 + max(0, place.delay - 1) * min(update / correction_updates, 1.0)


def one_update(_place: Placement, _update: int, _correction_updates: int) -> float:
    """The next update alone."""
    return 1.0


def one_late_update(place: Placement, _update: int, _correction_updates: int) -> float:
    """The next update, and none where the gradient is not late."""
    return float(min(place.delay, 1))
