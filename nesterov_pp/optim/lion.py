"""Lion: steps by the sign of the momentum alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nesterov_pp.kernels import Coefficients, Normaliser
from nesterov_pp.optim import coefficients
from nesterov_pp.optim.base import FusedOptimizer
from nesterov_pp.optim.corrections import DelayCompensation, Discrepancy, GapAware, Prediction
from nesterov_pp.optim.options import Options, check_hyperparameters, learning_rate, two_betas
from nesterov_pp.stash import WeightStash


class Lion(FusedOptimizer):
    """Lion ("Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675) in one pass over all tensors::

        p = (1 - lr wd) p - lr sign(beta1 m + (1 - beta1) g)
        m = beta2 m + (1 - beta2) g

    Each step moves every element of a weight by ``lr``, however large its gradient, so the paper uses a learning rate
    3 to 10 times smaller than AdamW's and a weight decay as many times larger. With a single moment, a step moves 20
    bytes per float32 parameter instead of 28.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate (default: 1e-4).
        betas: weight of the momentum in the step, and decay rate of the momentum (default: (0.9, 0.99)).
        weight_decay: rate of the decoupled weight decay (default: 0).
        maximize: ascend instead of descend (default: False).
        foreach, capturable, differentiable, fused, stash, max_grad_norm, on_nonfinite, state_dtype, master_weights,
            stochastic_rounding, seed, backend, correction, prediction: see ``NAdam``.

    Raises:
        ValueError: in the same cases as ``NAdam``.
    """

    family = "sign"
    _normaliser = Normaliser.SIGN
    _no_sparse = "Lion does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
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
        check_hyperparameters(lr=lr, betas=betas, weight_decay=weight_decay)
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
            "betas": betas,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, options, fused=fused)

    def _coefficients(
        self, group: dict[str, Any], t: int, mu_product: float, scale: float
    ) -> tuple[Coefficients, float]:
        beta1, beta2 = two_betas(group["betas"])
        row = coefficients.lion(
            lr=learning_rate(group["lr"], t),
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            scale=scale,
        )
        return row, mu_product
