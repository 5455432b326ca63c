"""NAdam: discounted Nesterov momentum with Adam's preconditioner."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nesterov_pp.kernels import Coefficients
from nesterov_pp.optim import coefficients
from nesterov_pp.optim.base import FusedOptimizer
from nesterov_pp.optim.corrections import DelayCompensation, Discrepancy, GapAware, Prediction
from nesterov_pp.optim.differentiable import step_nadam
from nesterov_pp.optim.options import Options, check_hyperparameters, learning_rate, two_betas
from nesterov_pp.stash import WeightStash


def nadam_coefficients(
    group: dict[str, Any], t: int, mu_product: float, *, decoupled: bool, horizon: float, scale: float
) -> tuple[Coefficients, float]:
    """Return the coefficients of NAdam's step ``t`` for a parameter group, and the new product of the mu."""
    beta1, beta2 = two_betas(group["betas"])
    return coefficients.nadam(
        t,
        mu_product,
        lr=learning_rate(group["lr"], t),
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        momentum_decay=group["momentum_decay"],
        decoupled=decoupled,
        horizon=horizon,
        scale=scale,
    )


class NAdam(FusedOptimizer):
    """``torch.optim.NAdam`` in one pass over all tensors. With ``betas=(0.99, 0.999)``, this is the delay-corrected
    method of "Nesterov Method for Asynchronous Pipeline Parallel Optimization" (arXiv 2505.01099).

    With step ``t``, ``mu_t = beta1 (1 - 0.96^(t psi) / 2)``, ``psi = momentum_decay`` and ``Pi_t = mu_1 ... mu_t``::

        m = m + (1 - beta1) (g - m)                 v = v + (1 - beta2) (g^2 - v)
        D = sqrt(v / (1 - beta2^t)) + eps
        p = (1 - lr wd) p - lr [ (1 - mu_t) / (1 - Pi_t) g + mu_{t+1} / (1 - Pi_{t+1}) m ] / D

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate (default: 2e-3).
        betas: decay rates of the two moments (default: (0.9, 0.999)).
        eps: term added to the denominator (default: 1e-8).
        weight_decay: weight decay rate (default: 0).
        momentum_decay: psi in the equations above (default: 4e-3).
        decoupled_weight_decay: decay the weights as AdamW does, instead of adding ``wd * p`` to the gradient (default:
            False).
        foreach: accepted for compatibility; a step is always one pass over all tensors.
        maximize: ascend instead of descend (default: False).
        capturable: count steps on the device, so that a step can be captured in a CUDA graph; needs the cuda or triton
            backend (default: False). Each replay is one step; a tensor ``lr`` on the device may change between replays.
            With a stash, capture one graph for each of its versions, in turn, and replay the graphs in turn.
        fused: let ``torch.amp.GradScaler`` leave unscaling to the pass, which does not rewrite gradients; on a GPU,
            steps are then counted there, without waiting for the scaler to report overflows. Hooks, and code that reads
            or clips gradients outside the optimizer, see scaled gradients, and ``step`` is called even if the step is
            skipped; frameworks treat the optimizer like ``torch.optim.Adam(fused=True)``. Default: None, the scaler
            unscales the gradients and skips steps itself, as with ``torch.optim.NAdam``.
        differentiable: let autograd record the step; runs on the reference backend, with a warning (default: False).
        stash: ring of weight versions to read from and write to (default: None, the parameters are updated in place).
        max_grad_norm: clip the gradients to this global norm inside the pass, without rewriting them (default: None, no
            clipping). ``last_grad_norm`` holds the last norm, a float64 0-d tensor.
        on_nonfinite: what to do with gradients that are not finite. "ignore" continues as torch does; "raise" raises an
            error that names the parameter, before anything is written (default: "ignore").
        state_dtype: dtype of the moments, float32 or bfloat16, or "8bit" for codes of eight bits, one float16 scale for
            32 of them (default: None, the dtype of the parameter, or float32 with ``master_weights``). A parameter
            group may have its own. "8bit" needs the cpu, triton or reference backend, and no correction or prediction.
        master_weights: keep a float32 copy of bfloat16 and float16 parameters in the state, step the copy, and write
            the parameter from it in the same pass (default: False). "24bit" keeps an int8 residual of bfloat16
            parameters instead and steps the two together; it needs the cpu, triton or reference backend.
        stochastic_rounding: round bfloat16 parameters and moments up or down at random, with probabilities that make
            the result right on average, instead of to nearest (default: False). A parameter written from its master is
            rounded to nearest.
        seed: seed for stochastic rounding (default: 0). The random bits depend only on (seed, step, parameter,
            element), so a rerun gives the same bits.
        backend: "auto", "cuda", "triton", "cpu" or "reference" (default: "auto").
        correction: ``DelayCompensation`` or ``GapAware``; corrects the late gradient inside the pass (default: None).
        prediction: ``Prediction`` or ``Discrepancy``; the pass also writes predicted weights (default: None).

    Parameters may be float32, float64, bfloat16 or float16; the last two are computed in float32. Complex parameters
    are stepped as pairs of real numbers, and each process steps its own shards of ``DTensor`` parameters. The
    constructor allocates the state. ``state_dict()`` has the format of ``torch.optim.NAdam``; each optimizer loads the
    state of the other.

    Raises:
        ValueError: a hyper-parameter is out of range, an option is not supported, the backend cannot be used, or the
            parameters are not those of the stash.
    """

    _has_mu_product = True
    _no_sparse = "NAdam does not support sparse gradients"
    _legacy: ClassVar[dict[str, Any]] = {**FusedOptimizer._legacy, "decoupled_weight_decay": False}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
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
        check_hyperparameters(lr=lr, eps=eps, betas=betas, weight_decay=weight_decay, momentum_decay=momentum_decay)
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
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, options, fused=fused)

    def _recorded(self) -> bool:
        step_nadam(self.param_groups, self.state)
        return True

    def _coefficients(
        self, group: dict[str, Any], t: int, mu_product: float, scale: float
    ) -> tuple[Coefficients, float]:
        horizon = 1.0 if self.options.prediction is not None else float(group.get("horizon", 1.0))
        return nadam_coefficients(
            group, t, mu_product, decoupled=group["decoupled_weight_decay"], horizon=horizon, scale=scale
        )
