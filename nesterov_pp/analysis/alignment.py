"""Measurements of whether the look-ahead points where the weights will go: Proposition 1 of arXiv 2505.01099.

Let ``Delta_t = w_t - w_{t-tau}`` be the displacement of the weights over a gradient's delay, and ``d_{t-tau}`` the
look-ahead at the point of that gradient. The proposition says that ``cos(Delta_t, d_{t-tau}) -> 1`` as the momentum
``gamma -> 1``. It is about direction only: the look-ahead is about ``1 / tau`` as long as the displacement (derived,
not in the paper).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from nesterov_pp.analysis.rules import LinearRule
from nesterov_pp.stash import WeightStash


def cosine(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """Return the cosine between two lists of tensors, each taken as one vector, in float64; NaN if one is zero."""
    ab = aa = bb = 0.0
    for x, y in zip(a, b, strict=True):
        u, v = _flat(x).double(), _flat(y).double()
        ab, aa, bb = ab + float(u @ v), aa + float(u @ u), bb + float(v @ v)
    return ab / math.sqrt(aa * bb) if aa > 0.0 and bb > 0.0 else math.nan


def noise_cosine(rule: LinearRule, delay: int) -> float:
    """Return the cosine of momentum and displacement of the stored weights if gradients are noise in many dimensions.

    The displacement is ``sum_k (c_grad g_k + c_momentum m_k)`` for ``k = 1 ... tau``. It contains ``m_0`` with the
    factor ``a = c_momentum (gamma + ... + gamma^tau)`` and ``g_k`` with the factor
    ``b_k = c_grad + c_momentum (1 - gamma^(tau - k + 1))``. With ``s = (1 - gamma) / (1 + gamma)``, the variance of m,
    the cosine is ``a sqrt(s) / sqrt(a^2 s + sum_k b_k^2)``. Derived. For w of Eq. 10, use the rule "ema".

    Raises:
        ValueError: ``delay`` is below 1.
    """
    if delay < 1:
        raise ValueError(f"delay must be at least 1, not {delay}")
    powers = [rule.gamma**k for k in range(1, delay + 1)]
    shared = rule.c_momentum * math.fsum(powers) * math.sqrt((1.0 - rule.gamma) / (1.0 + rule.gamma))
    fresh = math.fsum((rule.c_grad + rule.c_momentum * (1.0 - power)) ** 2 for power in powers)
    return shared / math.sqrt(shared**2 + fresh)


def lookahead_cosines(weights: Tensor, delay: int) -> Tensor:
    """Return Proposition 1's cosine along a recorded trajectory.

    ``cos(w_t - w_{t-tau}, w_{t-tau} - w_{t-tau-1})`` for ``t = tau + 1 ... T``: the look-ahead is
    ``gamma_t (w_t - w_{t-1})``, whose factor does not change its direction.

    Args:
        weights: ``[T + 1, ...]``, w_0 ... w_T (w of Eq. 10, before the look-ahead).
        delay: tau, at least 1.

    Returns:
        The ``T - delay`` cosines in float64; NaN where one of the two vectors is zero.

    Raises:
        ValueError: ``delay`` is below 1, or the trajectory is too short for it.
    """
    if delay < 1 or len(weights) < delay + 2:
        raise ValueError(
            f"delay must be at least 1, and weights must have at least {max(delay, 1) + 2} points, "
            f"not {delay} and {len(weights)}"
        )
    w = weights.detach().double().reshape(len(weights), -1)
    displacement = w[delay + 1 :] - w[1:-delay]
    lookahead = (w[1:] - w[:-1])[: len(displacement)]
    norms = displacement.norm(dim=1) * lookahead.norm(dim=1)
    return torch.where(norms > 0.0, (displacement * lookahead).sum(dim=1) / norms, math.nan)


class Averaging(Protocol):
    """An optimizer that keeps an average of the gradients in ``state[p]["exp_avg"]``, as torch's optimizers do."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    @property
    def state(self) -> Mapping[Any, dict[str, Any]]: ...


class AlignmentMeter:
    """A measurement of Proposition 1's cosine during training, for one stage, at the cost of reading the stash.

    Every ``every`` updates the meter keeps the direction of the newest version's look-ahead, which is that of the
    momentum over the preconditioner: ``-m`` for NAG, ``-m / (sqrt(v_hat) + eps)`` for NAdam. For AdamW, which has no
    look-ahead, it keeps the direction that a look-ahead would have. ``tau = stash.versions - 1`` updates later it
    compares this direction with the true displacement, the newest weights minus the oldest in the ring. These are the
    stored weights, at which gradients are taken, so they include the look-ahead. A measurement in progress holds one
    more tensor for each parameter.

    Args:
        stash: the stage's ring, with at least 2 versions.
        optimizer: the optimizer that writes the ring.
        every: updates between the starts of two measurements (default: 50); a measurement in progress is finished
            first.

    Raises:
        ValueError: the ring has one version (there is no delay), the optimizer keeps no averages of its gradients, or
            ``every`` is below 1.
    """

    def __init__(self, stash: WeightStash, optimizer: Averaging, every: int = 50) -> None:
        if stash.versions < 2:
            raise ValueError("a stage without a delay has no displacement to look ahead along")
        if every < 1:
            raise ValueError(f"every must be at least 1 update, not {every}")
        self._stash, self._optimizer, self._every = stash, optimizer, every
        if not all("exp_avg" in optimizer.state[p] for p in self._parameters()):
            raise ValueError("an optimizer without averages of its gradients has no direction to look ahead along")
        stash.leaves(self._parameters())
        self._version: int | None = None
        self._direction: list[Tensor] = []

    def observe(self) -> float | None:
        """Observe an update; call this after each one. Returns the cosine when a measurement ends, else None."""
        newest = self._stash.newest
        measured = None
        if self._version is not None and newest >= self._version + self._stash.versions - 1:
            value = cosine(self._displacement(newest), self._direction)
            measured = None if math.isnan(value) else value
            self._version, self._direction = None, []
        if self._version is None and newest > 0 and newest % self._every == 0:
            self._version, self._direction = newest, self._lookahead()
        return measured

    def state_dict(self) -> dict[str, Any]:
        """Return the measurement in progress."""
        return {"version": self._version, "direction": list(self._direction)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the measurement of ``state_dict``; a measurement whose version has left the ring is dropped.

        Raises:
            ValueError: the measurement belongs to other parameters.
        """
        direction = [d.clone() for d in state["direction"]]
        shapes = [leaf.shape for leaf in self._leaves(self._stash.newest)]
        if state["version"] is not None and [d.shape for d in direction] != shapes:
            raise ValueError("the saved measurement is of a stage with other parameters")
        kept = state["version"] is not None and self._stash.oldest <= state["version"] <= self._stash.newest
        self._version, self._direction = (state["version"], direction) if kept else (None, [])

    def _displacement(self, newest: int) -> Iterable[Tensor]:
        assert self._version is not None
        late = newest - self._stash.versions + 1
        return (a.detach() - b.detach() for a, b in zip(self._leaves(newest), self._leaves(late), strict=True))

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _leaves(self, version: int) -> list[Tensor]:
        self._stash.show(version)
        return self._stash.leaves(self._parameters())[self._stash.slot_of(version)]

    @torch.no_grad()
    def _lookahead(self) -> list[Tensor]:
        directions = []
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                state = self._optimizer.state[p]
                direction = -float(group["lr"]) * state["exp_avg"]
                if "exp_avg_sq" in state:
                    correction = 1.0 - group["betas"][1] ** float(state["step"])
                    direction = direction / ((state["exp_avg_sq"] / correction).sqrt() + group["eps"])
                directions.append(direction)
        return directions


def _flat(x: Tensor) -> Tensor:
    return (torch.view_as_real(x) if x.is_complex() else x).reshape(-1)
