"""Discounted Nesterov momentum, without a preconditioner."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nesterov_pp.kernels import Coefficients, Normaliser
from nesterov_pp.optim import coefficients
from nesterov_pp.optim.base import FusedOptimizer
from nesterov_pp.optim.corrections import DelayCompensation, Discrepancy, GapAware, Prediction
from nesterov_pp.optim.options import Options, check_hyperparameters, learning_rate
from nesterov_pp.stash import WeightStash

MomentumSchedule = Callable[[int], float]


def convex_schedule(t: int) -> float:
    """Return ``gamma_t = (t - 2) / t``, and 0 at ``t = 1``: the schedule of the paper's Theorem 1 (convex objectives).

    With a delay ``tau >= 2``, keep the step size below ``1 / (4 beta (tau - 1))`` for a ``beta``-smooth objective.
    """
    return max(0.0, (t - 2) / t)


class NAG(FusedOptimizer):
    """Nesterov's accelerated gradient with a discount on the delayed gradient: Eq. 10 of arXiv 2505.01099.

    Eq. 10 is ``w_{t+1} = w_t + d_t - lr (1 - gamma_t) grad(w_{t-tau} + d_{t-tau})`` with
    ``d_t = gamma_t (w_t - w_{t-1})``. The parameters hold the look-ahead point ``theta_t = w_t + d_t``, at which
    gradients have to be taken::

        m_t = gamma_t m_{t-1} + (1 - gamma_t) g_t
        theta_{t+1} = (1 - lr wd) theta_t - lr [ (1 - gamma_t) g_t + gamma_{t+1} m_t ]

    This equals Eq. 10 for a constant ``lr``. If ``lr`` changes, the momentum is multiplied by ``lr`` when it is used,
    as in ``torch.optim.SGD``.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate (default: 1e-3).
        momentum: gamma in [0, 1), or a function of the step ``t`` = 1, 2, ... such as ``convex_schedule`` (default:
            0.99). A function is not part of ``state_dict()``; each group's ``"momentum"`` holds its latest value.
        weight_decay: rate of the decoupled weight decay (default: 0).
        maximize: ascend instead of descend (default: False).
        foreach, fused, capturable, differentiable, stash, max_grad_norm, on_nonfinite, state_dtype, master_weights,
            stochastic_rounding, seed, backend, correction, prediction: see ``NAdam``.

    Raises:
        ValueError: in the same cases as ``NAdam``, or if a schedule returns a gamma outside [0, 1).
    """

    family = "sgd"
    _normaliser = Normaliser.NONE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float | MomentumSchedule = 0.99,
        weight_decay: float = 0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        stash: WeightStash | None = None,
        max_grad_norm: float | None = None,
        on_nonfinite: str = "ignore",
        state_dtype: torch.dtype | str | None = None,
        master_weights: bool | str = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        backend: str = "auto",
        correction: DelayCompensation | GapAware | None = None,
        prediction: Prediction | Discrepancy | None = None,
    ) -> None:
        check_hyperparameters(lr=lr, weight_decay=weight_decay)
        self._schedule = momentum if callable(momentum) else None
        gamma = momentum(1) if callable(momentum) else momentum
        _check_gamma(gamma)
        options = Options(
            stash=stash,
            max_grad_norm=max_grad_norm,
            on_nonfinite=on_nonfinite,
            state_dtype=state_dtype,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            backend=backend,
            correction=correction,
            prediction=prediction,
        )
        defaults = {
            "lr": lr,
            "momentum": gamma,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, options, fused=fused)

    @property
    def _counted_by_host(self) -> bool:  # type: ignore[override]
        return self._schedule is not None

    def _coefficients(
        self, group: dict[str, Any], t: int, mu_product: float, scale: float
    ) -> tuple[Coefficients, float]:
        gamma = gamma_next = group["momentum"]
        if self._schedule is not None:
            if isinstance(t, Tensor):
                raise ValueError(
                    "a momentum schedule is a function of a step count on the host; "
                    "with capturable=True, pass momentum as a number"
                )
            gamma, gamma_next = self._schedule(t), self._schedule(t + 1)
            group["momentum"] = gamma
        _check_gamma(gamma)
        _check_gamma(gamma_next)
        row = coefficients.nag(
            lr=learning_rate(group["lr"], t),
            gamma=gamma,
            gamma_next=gamma_next,
            weight_decay=group["weight_decay"],
            horizon=0.0 if self.options.prediction is not None else float(group.get("horizon", 1.0)),
            scale=scale,
        )
        return row, mu_product

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_schedule": self._schedule}


def _check_gamma(gamma: float) -> None:
    if not (isinstance(gamma, numbers.Real) and 0.0 <= gamma < 1.0):
        raise ValueError(f"Invalid momentum value: {gamma}")
