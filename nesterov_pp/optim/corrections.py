"""Corrections of late gradients that a step makes inside its pass, and the scalars they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nesterov_pp.kernels.scalars import Correction, CorrectionKind
from nesterov_pp.stash import Shadow


@dataclass(frozen=True)
class DelayCompensation:
    """DC-ASGD (arXiv 1609.08326): a first-order guess of the gradient at today's weights::

        g <- g + lambda g g (w - s)          s: the weights that g was computed with

    with ``lambda = strength``, or for ``adaptive`` ``lambda = strength / sqrt(a + 1e-7)``, where
    ``a <- decay a + (1 - decay) g^2`` is updated first. The paper's strengths: 0.04, and adaptive 2 with decay 0.95
    (that ``a`` comes first is recalled of its released updater, not re-read).

    Raises:
        ValueError: ``strength`` is negative, or ``decay`` not from 0 to 1.
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
    """Gap-Aware (arXiv 1909.10802): each element's gradient is divided by how many updates it is late::

        G = 1 + |w - s| / C,   C = sqrt(a / (1 - decay^(t-1))) + eps        s: the weights that g was computed with
        g <- g / G,  the decoupled weight decay is divided by G too
        a <- decay a + (1 - decay) u^2                                       u: the update just made, without decay

    ``C`` is the size of one update, so a weight that has moved by n typical updates gets 1 / (1 + n) of its gradient.
    ``decay``: 0.999, which is Gamma of the paper for SGD and beta2 of the usual Adam. For SGD the paper multiplies the
    mean of the squared velocity by the largest learning rate instead; equal for a constant one.

    Raises:
        ValueError: ``decay`` is not from 0 to 1, or ``eps`` is negative.
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
    """The ring holds predicted weights ``x``, at which forward and backward run; ``w`` is its shadow.

    Over a distance ``S = damping + damping^2 + ... + damping^s``, ``s`` being the group's ``"horizon"`` in updates::

        x = w' + S (w' - w)                                  by "displacement": the last update again (LWP, weight form)
        x = w' - S (c_grad + c_momentum) m / D               by "momentum": SpecTrain, XPipe, LWP in its velocity form

    The coefficients are the rule's (``Coefficients``): ``lr m_hat / (sqrt(v_hat) + eps)`` for AdamW, ``lr m`` for NAG,
    which with a prediction leaves its own look-ahead out, and ``lr sign(m)`` for Lion. ``damping`` 1: ``S = s``;
    ``damping`` gamma: the decayed sum of FTPipe's ``msnag``.

    Raises:
        ValueError: ``by`` is unknown, or ``damping`` not above 0 and at most 1.
    """

    by: Literal["displacement", "momentum"] = "displacement"
    damping: float = 1.0
    shadow: ClassVar[Shadow] = "stepped"

    def __post_init__(self) -> None:
        if self.by not in ("displacement", "momentum"):
            raise ValueError(f"a prediction is by 'displacement' or 'momentum', not {self.by!r}")
        if not 0.0 < self.damping <= 1.0:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping}")

    def scalars(self, reach: float, horizon: float) -> Correction:
        """``reach``: what one update takes from the weights for each unit of ``m / D``."""
        s = distance(horizon, self.damping)
        return Correction(ahead_last=s) if self.by == "displacement" else Correction(ahead_momentum=s * reach)


@dataclass(frozen=True)
class Discrepancy:
    """PipeMare's T2 (arXiv 1910.05124): backward runs at an estimate of the weights that forward ran with::

        delta <- gamma delta + (1 - gamma) (w' - w),  gamma = decay^(1 / s)
        u = w' - s delta                              s: the group's "horizon", the delay between forward and backward

    ``decay``: the paper's D, about ``exp(-2)`` (recalled). ``s`` 0 leaves ``u = w'``.

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
    """``damping + damping^2 + ... + damping^horizon``, also for a horizon that is no whole number."""
    if damping == 1.0:
        return horizon
    return float(damping * (1.0 - damping**horizon) / (1.0 - damping))


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise ValueError(f"{name} must be from {low:g} to below {high:g}, not {value}")
