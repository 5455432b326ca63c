"""The step that all optimizers share: gather, compute the scalars, one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from nesterov_pp.kernels import Coefficients, Plan, StepClass, Tensors, choose_backend, make_plan
from nesterov_pp.stash import WeightStash

ON_NONFINITE = ("ignore", "raise")
STATE_DTYPES = (None, torch.float32, torch.bfloat16)


class FusedOptimizer(Optimizer):
    """An optimizer whose whole step is one pass over all its tensors.

    Subclasses name their state and turn a parameter group and a step count into ``Coefficients``.
    """

    # torch.amp.GradScaler then leaves unscaling to the step: it sets grad_scale and found_inf around it.
    _step_supports_amp_scaling = True
    _adaptive: ClassVar[bool] = True
    _has_mu_product: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        stash: WeightStash | None,
        max_grad_norm: float | None,
        on_nonfinite: str,
        state_dtype: torch.dtype | None,
        backend: str,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ValueError(f"Invalid max_grad_norm: {max_grad_norm}; it must be above 0, or None for no clipping")
        if on_nonfinite not in ON_NONFINITE:
            raise ValueError(f"Invalid on_nonfinite: {on_nonfinite!r}; choose one of {', '.join(ON_NONFINITE)}")
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"Invalid state_dtype: {state_dtype}; choose one of {', '.join(map(str, STATE_DTYPES))}")
        self.state_dtype = state_dtype
        self.max_grad_norm = max_grad_norm
        self.on_nonfinite = on_nonfinite
        self.last_grad_norm: Tensor | None = None
        self._stash = stash
        self._requested_backend = backend
        self._plan: Plan | None = None
        self._planned: list[Tensor] = []
        self._stateless: list[Tensor] = []
        self.backend = backend
        super().__init__(params, defaults)
        if stash is not None:
            stash.leaves(self._parameters())
            stash.attach(self)
        self.backend = choose_backend(backend, self._parameters())

    # ------------------------------------------------------------------ the step

    @overload
    def step(self, closure: None = ..., *, version: int | None = ..., microbatches: int = ...) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, version: int | None = ..., microbatches: int = ...) -> float: ...

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        version: int | None = None,
        microbatches: int = 1,
    ) -> float | None:
        """Perform one step.

        Args:
            closure: re-evaluates the model and returns the loss, as in ``torch.optim``.
            version: with a stash: the version whose gradients are taken (and cleared). The newest weights are read and
                version ``stash.newest + 1`` is written. Default: the newest version.
            microbatches: how many microbatches were summed into the gradients; the step takes their mean. Default: 1.

        Raises:
            ValueError: a tensor or version does not fit; nothing has been changed.
            FloatingPointError: a gradient is not finite, with ``on_nonfinite="raise"``; nothing has been changed.

        Under ``torch.amp.GradScaler`` the gradients are unscaled inside the pass and not rewritten; a step with
        overflowed gradients changes nothing, the step count included.
        """
        if microbatches < 1:
            raise ValueError(f"microbatches must be at least 1, not {microbatches}")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._one_pass(version, microbatches)
        return loss

    # One call into C++: a compiler has nothing to fuse in it, and would recompile whenever lr changes.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _one_pass(self, version: int | None, microbatches: int) -> None:
        slots = (0, 0, 0)
        if self._stash is not None:
            slots = self._stash.begin_step(version, microbatches)
        elif version is not None:
            raise ValueError(f"step(version={version}) needs an optimizer built with stash=WeightStash(...)")
        plan = self._current_plan()
        classes = plan.collect(*slots)
        if self._overflowed():
            return
        scale = self._gradient_scale(plan, microbatches)
        rows, products = [], []
        for step_class in classes:
            row, product = self._row(step_class, scale)
            rows.append(row)
            products.append(product)
        plan.apply(rows, products)
        if self._stash is not None:
            self._stash.end_step(version, microbatches)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; with a stash, those of every version."""
        if self._stash is not None:
            self._stash.zero_grad(set_to_none)
        else:
            super().zero_grad(set_to_none)

    def _coefficients(
        self, group: dict[str, Any], t: int, mu_product: float, scale: float
    ) -> tuple[Coefficients, float]:
        """The scalars of step ``t`` (from 1) of a group, and the new mu product."""
        raise NotImplementedError

    def _row(self, step_class: StepClass, scale: float) -> tuple[Coefficients, float]:
        index, steps, mu_product = step_class
        group = self.param_groups[index]
        sign = -1.0 if group["maximize"] else 1.0
        return self._coefficients(group, int(steps) + 1, mu_product, sign * scale)

    def _overflowed(self) -> bool:
        """Whether a ``GradScaler`` found gradients that are not finite."""
        found_inf = getattr(self, "found_inf", None)
        return found_inf is not None and float(found_inf) > 0.0

    def _gradient_scale(self, plan: Plan, microbatches: int) -> float:
        """What the gradients are multiplied by: mean over microbatches, loss scale, and clipping by the global norm.

        The clipping factor is ``min(1, max_grad_norm / (norm + 1e-6))``, as ``torch.nn.utils.clip_grad_norm_`` has it.
        """
        loss_scale = getattr(self, "grad_scale", None)
        scale = 1.0 / (microbatches * (1.0 if loss_scale is None else float(loss_scale)))
        if self.max_grad_norm is None and self.on_nonfinite == "ignore":
            return scale
        norm = plan.gradient_norm() * scale
        if self.on_nonfinite == "raise" and not math.isfinite(norm) and (name := plan.nonfinite_parameter()):
            raise FloatingPointError(f"the gradient of {name} is not finite; nothing has been updated")
        self.last_grad_norm = torch.tensor(norm, dtype=torch.float64)
        if self.max_grad_norm is None:
            return scale
        factor = self.max_grad_norm / (norm + 1e-6)
        return scale if factor >= 1.0 else scale * factor  # a norm that is NaN makes every gradient NaN, as in torch

    # ------------------------------------------------------------------ state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            for p in self.param_groups[-1]["params"]:
                self._check_dtype(p)
        except ValueError:
            del self.param_groups[-1]
            raise
        for p in self.param_groups[-1]["params"]:
            if p.requires_grad:
                self._init_state(p)
        self._plan = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load ours or torch's ``state_dict``, keeping state that was saved in float32 or bfloat16 in that dtype.

        ``torch.optim.Optimizer`` casts all state but ``step`` to the parameter's dtype, which would round the scalars
        and moments of low-precision parameters and make a resumed run differ. State of float64 parameters is cast.
        """
        loaded: dict[str, Any] = {}

        def note(_: Optimizer, state: dict[str, Any]) -> None:
            loaded.update(state)  # after all hooks that may change it

        handle = self.register_load_state_dict_pre_hook(note)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        keys = [key for group in loaded["param_groups"] for key in group["params"]]
        for key, p in zip(keys, self._parameters(), strict=True):
            for name, saved in loaded["state"].get(key, {}).items():
                now = self.state[p][name]
                keeps = isinstance(saved, Tensor) and saved.dtype in STATE_DTYPES and p.dtype != torch.float64
                if keeps and now.dtype != saved.dtype:
                    self.state[p][name] = saved.to(device=now.device, copy=True)
        self._plan = None

    def _init_state(self, p: Tensor) -> None:
        scalar = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        state = self.state[p]
        state["step"] = torch.zeros((), dtype=scalar)
        if self._has_mu_product:
            state["mu_product"] = torch.ones((), dtype=torch.promote_types(scalar, p.dtype))
        dtype = self.state_dtype or p.dtype
        state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        if self._adaptive:
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)

    def _check_dtype(self, p: Tensor) -> None:
        if p.is_complex():
            raise ValueError(
                f"nesterov_pp.{type(self).__name__} does not step complex parameters; use torch.optim for them"
            )
        if p.dtype == torch.float64 and self.state_dtype is not None:
            raise ValueError(f"state_dtype={self.state_dtype} cannot hold the moments of float64 parameters")

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _current_plan(self) -> Plan:
        """The plan of the parameters that have state, made anew where a framework or a checkpoint replaced any."""
        parameters = self._parameters()
        if (
            self._plan is not None
            and len(parameters) == len(self._planned)
            and all(map(is_, parameters, self._planned))
            and all(p.grad is None for p in self._stateless)
        ):
            return self._plan
        for p in parameters:
            if p.grad is not None and not self.state.get(p):
                self._init_state(p)
        self._plan = self._make_plan()
        self._planned = parameters
        self._stateless = [p for p in parameters if not self.state.get(p)]
        return self._plan

    def _make_plan(self) -> Plan:
        names, groups, parameters = [], [], []
        for k, group in enumerate(self.param_groups):
            labels: Iterable[str] = group.get("param_names") or (f"parameter {i}" for i in range(len(group["params"])))
            for label, p in zip(labels, group["params"], strict=False):
                if not self.state.get(p):
                    continue
                names.append(label if len(self.param_groups) == 1 else f"{label} of group {k}")
                groups.append(k)
                parameters.append(p)
        self.backend = choose_backend(self._requested_backend, parameters)
        states = [self.state[p] for p in parameters]
        return make_plan(
            self.backend,
            Tensors(
                names=names,
                groups=groups,
                slots=self._stash.leaves(parameters) if self._stash is not None else [parameters],
                exp_avgs=[s["exp_avg"] for s in states],
                exp_avg_sqs=[s["exp_avg_sq"] for s in states] if self._adaptive else [],
                steps=[s["step"] for s in states],
                mu_products=[s["mu_product"] for s in states] if self._has_mu_product else [],
            ),
        )

    def __getstate__(self) -> dict[str, Any]:
        if self._stash is not None:
            raise TypeError(
                "an optimizer with a WeightStash cannot be copied or pickled; save its state_dict() and the stash's"
            )
        kept = ("max_grad_norm", "on_nonfinite", "state_dtype", "_requested_backend", "backend")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan, self._planned, self._stateless = None, [], []
        for name, value in (("_stash", None), ("last_grad_norm", None)):
            self.__dict__.setdefault(name, value)
        for group in self.param_groups:
            group.setdefault("maximize", False)


def check_hyperparameters(
    *,
    lr: float | Tensor,
    eps: float = 0.0,
    betas: tuple[float, float] = (0.0, 0.0),
    weight_decay: float = 0.0,
    momentum_decay: float = 0.0,
) -> None:
    """Refuse what ``torch.optim`` refuses, in its words.

    Raises:
        ValueError: a value is out of range.
    """
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not eps >= 0.0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if not weight_decay >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    if not momentum_decay >= 0.0:
        raise ValueError(f"Invalid momentum_decay value: {momentum_decay}")


def refuse(optimizer: str, **options: bool | None) -> None:
    """Refuse options that are set and that the fused pass does not have, rather than ignore them.

    Raises:
        ValueError: an option is true.
    """
    for option, value in options.items():
        if value:
            raise ValueError(
                f"nesterov_pp.{optimizer} does not support {option}=True; use torch.optim.{optimizer} for it"
            )
