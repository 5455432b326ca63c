"""Does the look-ahead point where the weights will go? Proposition 1 of arXiv 2505.01099, as a measurement.

With ``Delta_t = w_t - w_{t-tau}``, the displacement a gradient is late by, and ``d_{t-tau}``, the look-ahead of its
point, the proposition says that ``cos(Delta_t, d_{t-tau}) -> 1`` as the momentum ``gamma -> 1``. It is about direction:
the look-ahead is about ``1 / tau`` as long as the displacement (derived, not the paper's).
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
    """The cosine between two lists of tensors, each taken as one vector, in float64; NaN if one of them is zero."""
    ab = aa = bb = 0.0
    for x, y in zip(a, b, strict=True):
        u, v = _flat(x).double(), _flat(y).double()
        ab, aa, bb = ab + float(u @ v), aa + float(u @ u), bb + float(v @ v)
    return ab / math.sqrt(aa * bb) if aa > 0.0 and bb > 0.0 else math.nan


def noise_cosine(rule: LinearRule, delay: int) -> float:
    """The cosine of momentum and displacement of the stored weights where gradients are noise, in many dimensions.

    The displacement is ``sum_k (c_grad g_k + c_momentum m_k)`` for ``k = 1 ... tau``. It contains ``m_0`` with the
    factor ``a = c_momentum (gamma + ... + gamma^tau)`` and ``g_k`` with
    ``b_k = c_grad + c_momentum (1 - gamma^(tau - k + 1))``, so with ``s = (1 - gamma) / (1 + gamma)``, the variance of
    m, the cosine is ``a sqrt(s) / sqrt(a^2 s + sum_k b_k^2)``. Derived. For w of Eq. 10 take the rule "ema".

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
    """Proposition 1's cosine along a recorded trajectory.

    ``cos(w_t - w_{t-tau}, w_{t-tau} - w_{t-tau-1})`` for ``t = tau + 1 ... T``: the look-ahead is
    ``gamma_t (w_t - w_{t-1})``, whose factor does not turn it.

    Args:
        weights: ``[T + 1, ...]``, w_0 ... w_T (w of Eq. 10, before the look-ahead).
        delay: tau, at least 1.

    Returns:
        ``[T - delay]``, in float64; NaN where one of the two is zero.

    Raises:
        ValueError: ``delay`` is below 1, or the trajectory too short for it.
    """
    if delay < 1 or len(weights) < delay + 2:
        raise ValueError(
            f"a delay of {delay} needs to be at least 1, and at least {max(delay, 1) + 2} points, not {len(weights)}"
        )
    w = weights.detach().double().reshape(len(weights), -1)
    displacement = w[delay + 1 :] - w[1:-delay]
    lookahead = (w[1:] - w[:-1])[: len(displacement)]
    norms = displacement.norm(dim=1) * lookahead.norm(dim=1)
    return torch.where(norms > 0.0, (displacement * lookahead).sum(dim=1) / norms, math.nan)


class Averaging(Protocol):
    """An optimizer that keeps an average of the gradients, ``state[p]["exp_avg"]``, as torch's do."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    @property
    def state(self) -> Mapping[Any, dict[str, Any]]: ...


class AlignmentMeter:
    """The same during training, for one stage, at the price of reading the stash.

    Every so many updates it keeps the direction of the newest version's look-ahead, that of the momentum over the
    preconditioner: ``-m`` for NAG, ``-m / (sqrt(v_hat) + eps)`` for NAdam, and for AdamW, which has no look-ahead, the
    one it would have. ``tau = stash.versions - 1`` updates later it compares this with the true displacement, the
    newest weights minus the oldest in the ring. These are the stored weights, at which gradients are taken: look-ahead
    included. While a measurement is under way it holds one more tensor for each parameter.

    Args:
        stash: the stage's ring, of at least 2 versions.
        optimizer: the one that writes it.
        every: updates from the beginning of one measurement to that of the next (50); one that is under way is ended
            first.

    Raises:
        ValueError: the ring has one version (there is no delay), the optimizer has no averages of its gradients, or
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
        """To be called after each update: the cosine, where a measurement ends; else None."""
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
        """The measurement under way."""
        return {"version": self._version, "direction": list(self._direction)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the measurement of ``state_dict``; one whose version has left the ring is dropped.

        Raises:
            ValueError: it is of other parameters.
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
        return self._stash.leaves(self._parameters())[version % self._stash.versions]

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
