"""The options of all optimizers, in addition to the hyper-parameters of each rule, and the checks of both."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nesterov_pp.kernels.raw import is_subclass
from nesterov_pp.kernels.scalars import CorrectionKind
from nesterov_pp.optim.corrections import DelayCompensation, Discrepancy, GapAware, Prediction
from nesterov_pp.optim.local import is_dtensor
from nesterov_pp.stash import WeightStash

ON_NONFINITE = ("ignore", "raise")
EIGHT_BIT = "8bit"
STATE_DTYPES = (None, torch.float32, torch.bfloat16, EIGHT_BIT)
SPLIT = "24bit"
MASTER_WEIGHTS = (False, True, SPLIT)
LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """The options that all optimizers share; ``NAdam`` describes each of them.

    Raises:
        ValueError: an option is out of range, or two options do not go together.
    """

    stash: WeightStash | None = None
    max_grad_norm: float | None = None
    on_nonfinite: str = "ignore"
    state_dtype: torch.dtype | str | None = None
    master_weights: bool | str = False
    stochastic_rounding: bool = False
    seed: int = 0
    backend: str = "auto"
    correction: DelayCompensation | GapAware | None = None
    prediction: Prediction | Discrepancy | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.stash, WeightStash | None):
            raise ValueError(f"stash must be a WeightStash, not {type(self.stash).__name__}")
        norm = self.max_grad_norm
        if norm is not None and not (isinstance(norm, numbers.Real) and norm > 0.0):
            raise ValueError(f"Invalid max_grad_norm: {norm}; it must be above 0, or None for no clipping")
        if self.on_nonfinite not in ON_NONFINITE:
            raise ValueError(f"Invalid on_nonfinite: {self.on_nonfinite!r}; choose one of {', '.join(ON_NONFINITE)}")
        check_state_dtype(self.state_dtype)
        if self.master_weights not in MASTER_WEIGHTS:
            choices = ", ".join(map(repr, MASTER_WEIGHTS))
            raise ValueError(f"Invalid master_weights: {self.master_weights!r}; choose one of {choices}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"Invalid seed: {self.seed}; it must be a whole number from 0 to 2^64 - 1")
        if self.corrects and self.master_weights == SPLIT:
            raise ValueError(f"master_weights={SPLIT!r} cannot be combined with a correction or a prediction; use True")
        self._check_corrections()

    def _check_corrections(self) -> None:
        if self.correction is not None and self.stash is None:
            raise ValueError(f"{self.correction} needs the older weights of a WeightStash; pass stash=WeightStash(...)")
        if self.prediction is not None:
            wanted = self.prediction.shadow
            if self.stash is None or self.stash.shadow != wanted:
                raise ValueError(f"{self.prediction} needs stash=WeightStash(..., shadow={wanted!r})")
            if self.correction is not None and isinstance(self.prediction, Discrepancy):
                raise ValueError(f"{self.prediction} cannot be combined with {self.correction}; choose one")
        elif self.stash is not None and self.stash.shadow is not None:
            raise ValueError(f"a WeightStash with shadow={self.stash.shadow!r} needs an optimizer with a prediction")

    @property
    def are_torchs(self) -> bool:
        """Return whether torch's own step supports everything that these options ask for."""
        return replace(self, backend="auto") == Options()

    @property
    def corrects(self) -> bool:
        """Return whether the pass includes a correction or a prediction."""
        return self.correction is not None or self.prediction is not None

    @property
    def kind(self) -> CorrectionKind:
        """The kind of correction: how the gradient is changed, and what a running mean is kept of."""
        if self.correction is not None:
            return self.correction.kind
        return self.prediction.kind if isinstance(self.prediction, Discrepancy) else CorrectionKind.NONE

    @property
    def mean_name(self) -> str | None:
        """The entry of a parameter's state that holds a correction's running mean, or None."""
        if self.correction is not None:
            return self.correction.mean_name
        return self.prediction.mean_name if isinstance(self.prediction, Discrepancy) else None

    def has_master(self, p: Tensor) -> bool:
        """Return whether a parameter has float32 master weights."""
        return self.master_weights is True and p.dtype in LOW_PRECISION

    def has_residual(self, p: Tensor) -> bool:
        """Return whether a parameter has a residual, with which it is stepped in 24 bits."""
        return self.master_weights == SPLIT and p.dtype == torch.bfloat16

    def moment_dtype(self, p: Tensor) -> torch.dtype:
        """Return the dtype of a parameter's first moment, int8 for moments in eight bits."""
        if isinstance(self.state_dtype, str):
            return torch.int8
        wide = self.has_master(p) or self.has_residual(p)
        return self.state_dtype or (torch.float32 if wide else p.dtype)

    def of_group(self, group: Mapping[str, Any]) -> Options:
        """Return the options of a parameter group, which may have a ``state_dtype`` of its own.

        Raises:
            ValueError: the group's ``state_dtype`` is invalid, or does not go with another option.
        """
        own = group.get("state_dtype", self.state_dtype)
        options = self if own == self.state_dtype else replace(self, state_dtype=own)
        if own == EIGHT_BIT:
            if options.corrects:
                raise ValueError(f"state_dtype={own!r} cannot be combined with a correction or a prediction")
            unsupported = [name for name in ("amsgrad", "differentiable") if group.get(name)]
            if unsupported:
                raise ValueError(f"state_dtype={own!r} cannot be combined with {unsupported[0]}=True")
        if self.master_weights == SPLIT and group.get("differentiable"):
            raise ValueError(f"master_weights={SPLIT!r} cannot be combined with differentiable=True")
        return options

    def check_parameter(self, p: Tensor) -> None:
        """Refuse a parameter that these options do not support.

        Raises:
            ValueError: the parameter's dtype or layout is unsupported.
        """
        if p.layout != torch.strided:
            raise ValueError(f"a parameter has layout {_name(p.layout)}; optimizers only step dense parameters")
        if not (p.is_floating_point() or p.is_complex()):
            raise ValueError(
                f"a parameter is {_name(p.dtype)}; optimizers only step floating-point and complex parameters"
            )
        wide = p.dtype in (torch.float64, torch.complex128)
        if self.state_dtype is not None and (wide or p.is_complex()):
            raise ValueError(f"state_dtype={self.state_dtype} cannot hold the moments of {_name(p.dtype)} parameters")
        if self.state_dtype == EIGHT_BIT and is_subclass(p) and not is_dtensor(p):
            raise ValueError(
                f"state_dtype={EIGHT_BIT!r} is for plain tensors and DTensors; a parameter is a {type(p).__name__}"
            )
        if self.master_weights == SPLIT and p.dtype == torch.float16:
            raise ValueError(
                f"master_weights={SPLIT!r} is for bfloat16, but a parameter is float16; use master_weights=True"
            )
        half = p.dtype == torch.float16 and not self.master_weights
        if self.stochastic_rounding and half:
            raise ValueError(
                "stochastic_rounding is for bfloat16, but a parameter is float16; use master_weights=True for float16"
            )


def check_state_dtype(state_dtype: object) -> None:
    """Refuse a ``state_dtype`` that no optimizer has.

    Raises:
        ValueError: it is not one of ``STATE_DTYPES``.
    """
    if state_dtype not in STATE_DTYPES:
        choices = ", ".join(map(str, STATE_DTYPES))
        raise ValueError(f"Invalid state_dtype: {state_dtype}; choose one of {choices}")


def check_hyperparameters(
    *,
    lr: float | Tensor,
    eps: float = 0.0,
    betas: tuple[float | Tensor, float | Tensor] = (0.0, 0.0),
    weight_decay: float = 0.0,
    momentum_decay: float = 0.0,
) -> None:
    """Refuse hyper-parameters that ``torch.optim`` refuses, in its words.

    Raises:
        ValueError: a value is out of range or is not a number.
    """
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if isinstance(lr, Tensor) and lr.requires_grad:
        raise ValueError("lr requires a gradient, but a step does not propagate gradients to lr; pass lr.detach()")
    if _pair(betas) is None:
        raise ValueError(f"Invalid betas: {betas}; they must be a pair of numbers")
    if not _at_least_zero(lr):
        raise ValueError(f"Invalid learning rate: {lr}")
    if not _at_least_zero(eps):
        raise ValueError(f"Invalid epsilon value: {eps}")
    for i, beta in enumerate(_pair(betas) or ()):
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{i}] must be 1-element")
        if not (_at_least_zero(beta) and beta < 1.0):
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if not _at_least_zero(weight_decay):
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    if not _at_least_zero(momentum_decay):
        raise ValueError(f"Invalid momentum_decay value: {momentum_decay}")


def check_fused(parameters: Sequence[Tensor]) -> None:
    """Refuse parameters that torch's fused optimizers refuse, in their words.

    Raises:
        RuntimeError: a parameter is not floating-point, or is on a device without fused kernels.
    """
    from torch.optim.optimizer import _device_dtype_check_for_fused

    for p in parameters:
        _device_dtype_check_for_fused(p)


def check_fake(parameters: Sequence[Tensor]) -> None:
    """Refuse to step tensors with values under ``FakeTensorMode``, where operators only compute shapes.

    Raises:
        ValueError: a parameter with a gradient is not a ``FakeTensor``.
    """
    from torch._subclasses import FakeTensor

    if any(p.grad is not None and not isinstance(p, FakeTensor) for p in parameters):
        raise ValueError("FakeTensorMode only computes shapes, so a step inside it takes FakeTensor parameters only")


def scalar(value: float | Tensor) -> float:
    """Return a hyper-parameter as a plain number.

    Raises:
        TypeError: the value is not a number.
    """
    if type(value) is float:  # nearly always, and quicker than the questions below
        return value
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.detach())
    # A NumPy array without dimensions is a number, too.
    if isinstance(value, numbers.Real) or (getattr(value, "ndim", None) == 0 and not isinstance(value, Tensor)):
        return float(value)
    raise TypeError(f"{value!r} is not a number")


def learning_rate(lr: float | Tensor, t: Any) -> Any:
    """Return the learning rate for step ``t`` as a plain number; a tensor stays on a device where steps are counted.

    Raises:
        TypeError: ``lr`` is not a number.
    """
    if isinstance(lr, Tensor) and isinstance(t, Tensor) and lr.device == t.device and lr.numel() == 1:
        return lr.detach().reshape(()).double()
    return scalar(lr)


def two_betas(values: object) -> tuple[float, float]:
    """Return the two betas as plain numbers.

    Raises:
        TypeError: ``values`` is not a pair of numbers from 0 to 1.
    """
    pair = _pair(values)
    if pair is None:
        raise TypeError(f"{values!r} is not a pair of numbers")
    first, second = scalar(pair[0]), scalar(pair[1])
    if not (0.0 <= first <= 1.0 and 0.0 <= second <= 1.0):
        raise TypeError(f"betas must be from 0 to 1, not {values!r}")
    return first, second


def _pair(values: object) -> tuple[Any, Any] | None:
    """Return the two elements of any sequence of two (a tuple, a list, one from a configuration, an array), or None."""
    if isinstance(values, str | bytes | dict | set):
        return None
    try:
        pair: tuple[Any, ...] = tuple(values)  # type: ignore[arg-type]
    except TypeError:
        return None
    return (pair[0], pair[1]) if len(pair) == 2 else None


def check_tensor_hyperparameters(lr: object, betas: object, *, foreach: bool | None, capturable: bool) -> None:
    """Refuse tensors where ``torch.optim.AdamW`` refuses them, in its words.

    Raises:
        ValueError: ``lr`` or a beta is a tensor with ``foreach=True`` and ``capturable=False``, or only one beta is.
    """
    without = "as a Tensor is not supported for capturable=False and foreach=True"
    refuses = bool(foreach) and not capturable
    if isinstance(lr, Tensor) and refuses:
        raise ValueError(f"lr {without}")
    pair = _pair(betas) or ()
    if len({isinstance(beta, Tensor) for beta in pair}) == 2:
        raise ValueError("betas must be either both floats or both Tensors")
    for i, beta in enumerate(pair):
        if isinstance(beta, Tensor) and refuses:
            raise ValueError(f"betas[{i}] {without}")


def _at_least_zero(value: float | Tensor) -> bool:
    try:
        number = scalar(value)
    except TypeError:
        return False
    return math.isfinite(number) and number >= 0.0


def _name(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")
