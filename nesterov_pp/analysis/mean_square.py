"""The step up to which, under random delays, not only the mean but the variance of the weights stays bounded."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from nesterov_pp.analysis.delays import Delay
from nesterov_pp.analysis.rules import LinearRule, linear_rule
from nesterov_pp.analysis.stability import max_stable_step

_BISECTIONS = 20
_LONGEST = 300


def mean_square_radius(rule: LinearRule, delay: Delay, step: float) -> float:
    """Return the factor by which an update multiplies ``E[theta^2]`` in the long run, with independent delays.

    An update multiplies the state ``x = (theta_t, ..., theta_{t-D}, m)`` by a random matrix ``A``. The factor is the
    spectral radius of ``X -> E[A X A^T]``. That map takes covariances to covariances, so its spectral radius is one of
    its eigenvalues.

    Raises:
        ValueError: the delay is not in whole updates, or is longer than 300.
    """
    from scipy.sparse.linalg import LinearOperator, eigs

    shares = _shares(delay)
    side = len(shares) + 1

    def apply(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return _second_moments(rule, shares, step, x.reshape(side, side)).ravel()

    operator = LinearOperator((side * side, side * side), matvec=apply, dtype=np.float64)
    (value,) = eigs(operator, k=1, which="LM", v0=np.eye(side).ravel(), return_eigenvectors=False, tol=1e-9)
    return float(abs(value))


def max_mean_square_step(
    rule: str | LinearRule = "nag",
    *,
    momentum: float = 0.99,
    delay: Delay,
    horizon: float | None = None,
) -> float:
    """Return the largest step size times curvature at which the variance of the weights stays bounded.

    The arguments are as for ``max_stable_step``, whose edge (of the mean) the result never exceeds. It is found by
    bisection, to 1e-6 of that edge.

    Raises:
        ValueError: as for ``max_stable_step``, or the delay is longer than 300 updates.
    """
    scalars = rule if isinstance(rule, LinearRule) else linear_rule(rule, momentum=momentum, horizon=horizon)
    _shares(delay)
    low, high = 0.0, max_stable_step(scalars, delay=delay)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if mean_square_radius(scalars, delay, middle) < 1.0:
            low = middle
        else:
            high = middle
    return low


def _shares(delay: Delay) -> NDArray[np.float64]:
    shares = delay.probabilities
    if shares is None or len(shares) > _LONGEST + 1:
        limit = (
            "in whole updates" if shares is None else f"of at most {_LONGEST} updates (it goes up to {len(shares) - 1})"
        )
        raise ValueError(f"the mean-square edge needs a delay {limit}; {delay.name} is not one")
    return shares


def _second_moments(
    rule: LinearRule, shares: NDArray[np.float64], step: float, x: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return ``E[A X A^T]``.

    ``A`` makes ``theta' = theta_0 - alpha theta_tau - beta m`` and ``m' = gamma m + delta theta_tau`` of the state.
    """
    gamma, delta = rule.gamma, 1.0 - rule.gamma
    alpha, beta = step * (rule.c_grad + rule.c_momentum * delta), step * rule.c_momentum * gamma
    late = shares @ x[:-1]  # E[theta_tau x_j | tau's distribution]
    square = math.fsum(shares * np.diagonal(x)[:-1])
    new = np.empty_like(x)
    theta = x[0] - alpha * late - beta * x[-1]
    momentum = gamma * x[-1] + delta * late
    new[1:-1, 1:-1] = x[:-2, :-2]
    new[0, 1:-1] = new[1:-1, 0] = theta[:-2]
    new[-1, 1:-1] = new[1:-1, -1] = momentum[:-2]
    new[0, 0] = theta[0] - alpha * (late[0] - alpha * square - beta * late[-1]) - beta * theta[-1]
    new[0, -1] = new[-1, 0] = gamma * theta[-1] + delta * (late[0] - alpha * square - beta * late[-1])
    new[-1, -1] = gamma * momentum[-1] + delta * (gamma * late[-1] + delta * square)
    return new
