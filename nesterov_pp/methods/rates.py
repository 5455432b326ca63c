"""Learning rates that depend on the delay."""

from __future__ import annotations

import math

CORRECTION_UPDATES = 7_000
"""T of Eq. 13 as in the paper's released code, for a run of 50,000 updates."""


def discount_by_delay(delay: int, update: int, correction_updates: int) -> float:
    """Return the learning-rate factor of Eq. 13 of arXiv 2505.01099.

    ``tau^-rho_t`` with ``rho_t = 1 - min((1 + t) / T, 1)`` for update ``t`` = 0, 1, ...; it is 1 for ``tau <= 1`` and
    from ``t = T - 1`` on.
    """
    if delay <= 1:
        return 1.0
    rho = 1.0 - min((1 + update) / correction_updates, 1.0)
    return math.pow(delay, -rho)


def one_over_delay(delay: int, _update: int, _correction_updates: int) -> float:
    """Return the factor of staleness-aware SGD (arXiv 1511.05950; recalled): ``1 / tau``, and 1 for ``tau = 0``."""
    return 1.0 / max(1, delay)
