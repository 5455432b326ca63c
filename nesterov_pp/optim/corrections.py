"""Corrections of late gradients that a step makes inside its pass, and their scalars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nesterov_pp.kernels.scalars import Correction, CorrectionKind
from nesterov_pp.stash import Shadow


@dataclass(frozen=True)
class DelayCompensation:
    """DC-ASGD (arXiv 1609.08326): a first-order estimate of the gradient at the current weights::

        g <- g + lambda g g (w - s)          s: the weights that g was computed with

    with ``lambda = strength``. With ``adaptive``, ``lambda = strength / sqrt(a + 1e-7)``, where
    ``a <- decay a + (1 - decay) g^2`` is updated first. The paper uses strength 0.04, or strength 2 and decay 0.95 if
    adaptive (that ``a`` is updated first is recalled from its released updater, not checked there again).

    Raises:
        ValueError: ``strength`` is not in [0, inf), or ``decay`` is not in [0, 1).
    """

    strength: float = 0.04
    adaptive: bool = False
    decay: float = 0.95

    def __post_init__(self) -> None:
        _check("strength", self.strength, 0.0, float("inf"))
        _check("decay", self.decay, 0.0, 1.0)

    @property
    def kind(self) -> CorrectionKind:
        return CorrectionKind.ADAPTIVE_DELAY_COMPENSATION if self.adaptive else CorrectionKind.DELAY_COMPENSATION

    @property
    def mean_name(self) -> str | None:
        return "exp_avg_grad_sq" if self.adaptive else None

    def scalars(self, t: int | Tensor) -> Correction:
        return Correction(strength=self.strength, mean_complement=1.0 - self.decay, eps=1e-7)


@dataclass(frozen=True)
class GapAware:
    """Gap-Aware (arXiv 1909.10802): each element of the gradient is divided by its gap, its lateness in updates::

        G = 1 + |w - s| / C,   C = sqrt(a / (1 - decay^(t-1))) + eps        s: the weights that g was computed with
        g <- g / G,  the decoupled weight decay is divided by G too
        a <- decay a + (1 - decay) u^2                                       u: the update just made, without decay

    ``C`` is the size of one update, so a weight that has moved by n typical updates gets 1 / (1 + n) of its gradient.
    The default ``decay``, 0.999, is the paper's Gamma for SGD and the usual beta2 of Adam. For SGD the paper instead
    multiplies the mean of the squared velocity by the largest learning rate; for a constant rate, both are equal.

    Raises:
        ValueError: ``decay`` is not in [0, 1), or ``eps`` is not in [0, inf).
    """

    decay: float = 0.999
    eps: float = 1e-8
    kind: ClassVar[CorrectionKind] = CorrectionKind.GAP
    mean_name: ClassVar[str] = "exp_avg_step_sq"

    def __post_init__(self) -> None:
        _check("decay", self.decay, 0.0, 1.0)
        _check("eps", self.eps, 0.0, float("inf"))

    def scalars(self, t: int | Tensor) -> Correction:
        inv_bias: Any
        if isinstance(t, Tensor):
            inv_bias = torch.where(t > 1, 1.0 / (1.0 - self.decay ** (t - 1)), 1.0)
        else:
            inv_bias = 1.0 / (1.0 - self.decay ** (t - 1)) if t > 1 else 1.0
        return Correction(mean_complement=1.0 - self.decay, inv_bias=inv_bias, eps=self.eps)


@dataclass(frozen=True)
class Prediction:
    """Weight prediction: the ring holds predicted weights ``x``, used by forward and backward; its shadow is ``w``.

    Over a distance ``S = damping + damping^2 + ... + damping^s``, where ``s`` is the group's ``"horizon"`` in updates::

        x = w' + S (w' - w)                                  by "displacement": the last update again (LWP, weight form)
        x = w' - S (c_grad + c_momentum) m / D               by "momentum": SpecTrain, XPipe, LWP in its velocity form

    ``c_grad`` and ``c_momentum`` are those of the rule (``Coefficients``): ``(c_grad + c_momentum) m / D`` is
    ``lr m_hat / (sqrt(v_hat) + eps)`` for AdamW, ``lr m`` for NAG, which leaves out its own look-ahead when it has a
    prediction, and ``lr sign(m)`` for Lion. With ``damping`` 1, ``S = s``; with ``damping`` gamma, ``S`` is the decayed
    sum of FTPipe's ``msnag``.

    Raises:
        ValueError: ``by`` is unknown, or ``damping`` is not in (0, 1].
    """

    by: Literal["displacement", "momentum"] = "displacement"
    damping: float = 1.0
    shadow: ClassVar[Shadow] = "stepped"

    def __post_init__(self) -> None:
        if self.by not in ("displacement", "momentum"):
            raise ValueError(f"by must be 'displacement' or 'momentum', not {self.by!r}")
        if not 0.0 < self.damping <= 1.0:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping}")

    def scalars(self, reach: float, horizon: float) -> Correction:
        """Return the scalars. ``reach`` is how much one update takes from the weights per unit of ``m / D``."""
        s = distance(horizon, self.damping)
        return Correction(ahead_last=s) if self.by == "displacement" else Correction(ahead_momentum=s * reach)


@dataclass(frozen=True)
class Discrepancy:
    """PipeMare's T2 (arXiv 1910.05124): backward runs with an estimate of the weights of its forward::

        delta <- gamma delta + (1 - gamma) (w' - w),  gamma = decay^(1 / s)
        u = w' - s delta                              s: the group's "horizon", the delay between forward and backward

    ``decay`` is the paper's D, about ``exp(-2)`` (from memory). With ``s`` 0, ``u = w'``.

    Raises:
        ValueError: ``decay`` is not above 0 and below 1.
    """

    decay: float = 0.135
    kind: ClassVar[CorrectionKind] = CorrectionKind.DISCREPANCY
    mean_name: ClassVar[str] = "exp_avg_step"
    shadow: ClassVar[Shadow] = "linearised"

    def __post_init__(self) -> None:
        if not 0.0 < self.decay < 1.0:
            raise ValueError(f"decay must be above 0 and below 1, not {self.decay}")

    def scalars(self, reach: float, horizon: float) -> Correction:
        gamma = self.decay ** (1.0 / horizon) if horizon > 0.0 else 0.0
        return Correction(mean_complement=1.0 - gamma, ahead_mean=-horizon)


def distance(horizon: float, damping: float) -> float:
    """Return ``damping + damping^2 + ... + damping^horizon``, also for a horizon that is not a whole number."""
    if damping == 1.0:
        return horizon
    return float(damping * (1.0 - damping**horizon) / (1.0 - damping))


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise ValueError(f"{name} must be from {low:g} to below {high:g}, not {value}")
