"""What all optimizers of the family take beside their rule's hyper-parameters, and the checks of both."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from nesterov_pp.stash import WeightStash

ON_NONFINITE = ("ignore", "raise")
STATE_DTYPES = (None, torch.float32, torch.bfloat16)
LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """See ``NAdam`` for what each does.

    Raises:
        ValueError: one is out of range.
    """

    stash: WeightStash | None = None
    max_grad_norm: float | None = None
    on_nonfinite: str = "ignore"
    state_dtype: torch.dtype | None = None
    master_weights: bool = False
    stochastic_rounding: bool = False
    seed: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        norm = self.max_grad_norm
        if norm is not None and not (isinstance(norm, numbers.Real) and norm > 0.0):
            raise ValueError(f"Invalid max_grad_norm: {norm}; it must be above 0, or None for no clipping")
        if self.on_nonfinite not in ON_NONFINITE:
            raise ValueError(f"Invalid on_nonfinite: {self.on_nonfinite!r}; choose one of {', '.join(ON_NONFINITE)}")
        if self.state_dtype not in STATE_DTYPES:
            choices = ", ".join(map(str, STATE_DTYPES))
            raise ValueError(f"Invalid state_dtype: {self.state_dtype}; choose one of {choices}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"Invalid seed: {self.seed}; it must be a whole number from 0 to 2^64 - 1")

    def has_master(self, p: Tensor) -> bool:
        return self.master_weights and p.dtype in LOW_PRECISION

    def moment_dtype(self, p: Tensor) -> torch.dtype:
        return self.state_dtype or (torch.float32 if self.has_master(p) else p.dtype)

    def check_parameter(self, p: Tensor) -> None:
        """Refuse a parameter that these options do not go with.

        Raises:
            ValueError: so it is.
        """
        wide = p.dtype in (torch.float64, torch.complex128)
        if self.state_dtype is not None and (wide or p.is_complex()):
            raise ValueError(f"state_dtype={self.state_dtype} cannot hold the moments of {_name(p.dtype)} parameters")
        half = p.dtype == torch.float16 and not self.master_weights
        if self.stochastic_rounding and half:
            raise ValueError(
                "stochastic_rounding is for bfloat16, and a parameter is float16; use master_weights=True for those"
            )


def check_hyperparameters(
    *,
    lr: float | Tensor,
    eps: float = 0.0,
    betas: tuple[float | Tensor, float | Tensor] = (0.0, 0.0),
    weight_decay: float = 0.0,
    momentum_decay: float = 0.0,
) -> None:
    """Refuse what ``torch.optim`` refuses, in its words.

    Raises:
        ValueError: a value is out of range, or no number.
    """
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas}; they must be a pair of numbers")
    if not _at_least_zero(lr):
        raise ValueError(f"Invalid learning rate: {lr}")
    if not _at_least_zero(eps):
        raise ValueError(f"Invalid epsilon value: {eps}")
    for i, beta in enumerate(betas):
        if not (_at_least_zero(beta) and beta < 1.0):
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if not _at_least_zero(weight_decay):
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    if not _at_least_zero(momentum_decay):
        raise ValueError(f"Invalid momentum_decay value: {momentum_decay}")


def scalar(value: float | Tensor) -> float:
    """A hyper-parameter as a plain number.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, numbers.Real | Tensor):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def _at_least_zero(value: float | Tensor) -> bool:
    return isinstance(value, numbers.Real | Tensor) and math.isfinite(float(value)) and float(value) >= 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
