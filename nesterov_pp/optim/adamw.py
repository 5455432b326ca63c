"""AdamW: the shared one-pass step with the coefficients of AdamW."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nesterov_pp.kernels import Coefficients
from nesterov_pp.optim import coefficients
from nesterov_pp.optim.base import FusedOptimizer
from nesterov_pp.optim.corrections import DelayCompensation, Discrepancy, GapAware, Prediction
from nesterov_pp.optim.differentiable import step_adamw
from nesterov_pp.optim.options import (
    Options,
    check_hyperparameters,
    check_tensor_hyperparameters,
    learning_rate,
    two_betas,
)
from nesterov_pp.stash import WeightStash


def adamw_coefficients(group: dict[str, Any], t: int, *, scale: float) -> Coefficients:
    """Return the coefficients of AdamW's step ``t`` for a parameter group."""
    beta1, beta2 = two_betas(group["betas"])
    return coefficients.adamw(
        t,
        lr=learning_rate(group["lr"], t),
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        scale=scale,
    )


class AdamW(FusedOptimizer):
    """``torch.optim.AdamW`` (arXiv 1711.05101) in one pass over all tensors::

        m = m + (1 - beta1) (g - m)                 v = v + (1 - beta2) (g^2 - v)
        p = (1 - lr wd) p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate (default: 1e-3).
        betas: decay rates of the two moments (default: (0.9, 0.999)).
        eps: term added to the denominator (default: 1e-8).
        weight_decay: rate of the decoupled weight decay (default: 1e-2).
        maximize: ascend instead of descend (default: False).
        foreach: accepted for compatibility; a step is always one pass over all tensors.
        amsgrad: use the largest second moment so far in the denominator; runs on the reference backend, with a warning
            (default: False).
        capturable, differentiable, fused, stash, max_grad_norm, on_nonfinite, state_dtype, master_weights,
            stochastic_rounding, seed, backend, correction, prediction: see ``NAdam``.

    ``state_dict()`` has the format of ``torch.optim.AdamW``; each optimizer loads the state of the other.

    Raises:
        ValueError: in the same cases as ``NAdam``.
    """

    _no_sparse = "Adam does not support sparse gradients, please consider SparseAdam instead"
    _legacy: ClassVar[dict[str, Any]] = {
        **FusedOptimizer._legacy,
        "amsgrad": False,
        "fused": None,
        "decoupled_weight_decay": True,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
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
        check_hyperparameters(lr=lr, eps=eps, betas=betas, weight_decay=weight_decay)
        check_tensor_hyperparameters(lr, betas, foreach=foreach, capturable=capturable)
        if fused and differentiable:
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
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
            "betas": two_betas(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults, options, fused=fused)

    def _recorded(self) -> bool:
        step_adamw(self.param_groups, self.state)
        return True

    def _coefficients(
        self, group: dict[str, Any], t: int, mu_product: float, scale: float
    ) -> tuple[Coefficients, float]:
        return adamw_coefficients(group, t, scale=scale), mu_product
