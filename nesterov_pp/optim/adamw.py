"""AdamW: the same pass with other coefficients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nesterov_pp.kernels import Coefficients
from nesterov_pp.optim import coefficients
from nesterov_pp.optim.base import FusedOptimizer, check_hyperparameters, refuse
from nesterov_pp.stash import WeightStash


class AdamW(FusedOptimizer):
    """``torch.optim.AdamW`` (arXiv 1711.05101) in one pass over all tensors::

        m = m + (1 - beta1) (g - m)                 v = v + (1 - beta2) (g^2 - v)
        p = (1 - lr wd) p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate (1e-3).
        betas: decay rates of the two moments ((0.9, 0.999)).
        eps: added to the denominator (1e-8).
        weight_decay: decoupled decay rate (1e-2).
        maximize: ascend instead of descend (False).
        foreach, fused: accepted for compatibility; the pass is always one over all tensors.
        amsgrad, capturable, differentiable: refused when true.
        stash, max_grad_norm, on_nonfinite, state_dtype, backend: as for ``NAdam``.

    ``state_dict()`` is that of ``torch.optim.AdamW``: either loads the other's.

    Raises:
        ValueError: as for ``NAdam``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
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
        state_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        check_hyperparameters(lr=lr, eps=eps, betas=betas, weight_decay=weight_decay)
        refuse("AdamW", amsgrad=amsgrad, capturable=capturable, differentiable=differentiable)
        defaults = {
            "lr": lr,
            "betas": betas,
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
        super().__init__(
            params,
            defaults,
            stash=stash,
            max_grad_norm=max_grad_norm,
            on_nonfinite=on_nonfinite,
            state_dtype=state_dtype,
            backend=backend,
        )

    def _coefficients(
        self, group: dict[str, Any], t: int, mu_product: float, scale: float
    ) -> tuple[Coefficients, float]:
        beta1, beta2 = group["betas"]
        row = coefficients.adamw(
            t,
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            scale=scale,
        )
        return row, mu_product
