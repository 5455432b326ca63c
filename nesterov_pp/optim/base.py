"""The step that all optimizers share: gather, compute the scalars, one pass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from nesterov_pp.kernels import Coefficients, Correction, StepClass, choose_backend
from nesterov_pp.optim import checkpoint, counts
from nesterov_pp.optim.device_counts import DEVICE_BACKENDS, check_capturable, check_not_captured, needs_host
from nesterov_pp.optim.fresh import follow_layouts, fresh_state
from nesterov_pp.optim.local import local
from nesterov_pp.optim.options import Options
from nesterov_pp.optim.prepared import Prepared
from nesterov_pp.optim.scaling import forget_scale_on_failure, gradient_scale


class FusedOptimizer(Optimizer):
    """An optimizer whose whole step is one pass over all its tensors.

    Subclasses name their state and turn a parameter group and a step count into ``Coefficients``.
    """

    # Where it is True torch.amp.GradScaler leaves unscaling to the step: it sets grad_scale and found_inf around it.
    _step_supports_amp_scaling = False
    _adaptive: ClassVar[bool] = True
    _has_mu_product: ClassVar[bool] = False
    _counted_by_host = False  # a rule whose scalars are functions of a count on the host
    _ready = False  # the constructor has seen all its groups
    _warned = False
    _no_sparse: ClassVar[str] = "NAG does not support sparse gradients"
    # What groups of checkpoints from before an option existed are to have, as torch.optim has it.
    _legacy: ClassVar[dict[str, Any]] = {
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
    }

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], options: Options, *, fused: bool | None = None
    ) -> None:
        self.options = options
        # With a stash the scaler would unscale one version's gradients and have another's stepped: the step refuses.
        if fused or options.stash is not None:
            self._step_supports_amp_scaling = True
        self.last_grad_norm: Tensor | None = None
        self.backend = options.backend
        self._prepared: Prepared | None = None
        super().__init__(params, defaults)
        if options.stash is not None:
            options.stash.leaves(self._parameters())
        plain = [local(p) for p in self._parameters()]
        self.backend = choose_backend(options.backend, plain, self._only_reference(), corrects=options.corrects)
        if options.stash is not None:
            options.stash.attach(self)
        self._ready = True
        self._warn_of_reference(stacklevel=4)

    # ------------------------------------------------------------------ the step

    @overload
    def step(self, closure: None = ..., *, version: int | None = ..., microbatches: int = ...) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, version: int | None = ..., microbatches: int = ...) -> float: ...

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
            ValueError: a tensor, a version or a group's hyper-parameter does not fit; nothing has been changed.
            FloatingPointError: a gradient is not finite, with ``on_nonfinite="raise"``; nothing has been changed.
            RuntimeError: a gradient is sparse; nothing has been changed.

        With ``fused=True`` the gradients of a ``torch.amp.GradScaler`` are unscaled inside the pass and not rewritten;
        a step with overflowed gradients changes nothing, the step count included.
        """
        if not isinstance(microbatches, int) or microbatches < 1:
            raise ValueError(f"microbatches must be a whole number of at least 1, not {microbatches}")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
            self._one_pass(version, microbatches)
        return loss

    def _patch_step_function(self) -> None:
        super()._patch_step_function()
        forget_scale_on_failure(type(self))

    # One call into C++: a compiler has nothing to fuse in it, and would recompile whenever lr changes. Disabled as in
    # torch.optim: torch.compiler.disable imports the compiler at once, which doubles the time of an import.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _one_pass(self, version: int | None, microbatches: int) -> None:
        stash = self.options.stash
        slots = (0, 0, 0)
        if stash is not None:
            if hasattr(self, "found_inf"):
                raise ValueError(
                    "torch.amp.GradScaler sees the gradients of one weight version only; "
                    "use bfloat16, which needs no scaling, with a WeightStash"
                )
            slots = stash.begin_step(version, microbatches)
        elif version is not None:
            raise ValueError(f"step(version={version}) needs an optimizer built with stash=WeightStash(...)")
        if self._capturable():
            check_capturable(self.param_groups, self.options, self.backend, has_mu_product=self._has_mu_product)
        else:
            check_not_captured(type(self).__name__)
        grads_of, source, target = slots
        prepared, classes = self._collect(slots)
        if prepared.device_counts is None and self._overflowed():
            return
        loss_scale = getattr(self, "grad_scale", None)
        scale, norm = gradient_scale(prepared, self.options, grads_of, microbatches, loss_scale)
        if norm is not None:
            self.last_grad_norm = norm
        if prepared.device_counts is not None:
            on_device, count = prepared.device_counts.next_step(
                prepared.stepped(grads_of),
                partial(self._row_of, scale=scale),
                self._correction_of if self.options.corrects else None,
                getattr(self, "found_inf", None),
            )
            prepared.masters.follow(source)
            prepared.plan.apply_rows(on_device)
            count()
        else:
            rows, products = [], []
            for step_class in classes:
                row, product = self._row(step_class, scale)
                rows.append(row)
                products.append(product)
            prepared.masters.follow(source)
            if self.options.corrects:
                pairs = zip(classes, rows, strict=True)
                corrections = [self._correction_of(group, int(steps) + 1, row) for (group, steps, _), row in pairs]
                prepared.plan.apply(rows, products, corrections)
            else:
                prepared.plan.apply(rows, products)
        prepared.masters.written(target)
        if stash is not None:
            stash.end_step(version, microbatches)

    def _collect(self, slots: tuple[int, int, int]) -> tuple[Prepared, list[StepClass]]:
        """The parameters as they are now, with the gradients of this step checked and taken."""
        prepared = self._prepare()
        try:
            return prepared, prepared.collect(*slots)
        except ValueError:
            if any(p.grad is not None and p.grad.is_sparse for p in prepared.leaves[slots[0]]):
                raise RuntimeError(self._no_sparse) from None
            if not follow_layouts(self._parameters(), self.state):
                raise
        return self._collect(slots)

    def _prepare(self) -> Prepared:
        only, on_device = self._only_reference(), self._counts_on_device()
        if self._prepared is None or not self._prepared.holds(self.param_groups, self.state, only, on_device):
            self._forget_replaced()
            new = [p for p in self._parameters() if p.grad is not None and not self.state.get(p)]
            for p in new:
                if p.grad is not None and p.grad.is_sparse:
                    raise RuntimeError(self._no_sparse)
                self.options.check_parameter(p)
            self._init_state(new)
            if on_device:
                counts.to_devices(self.state)
            elif self._prepared is not None and self._prepared.device_counts is not None:
                counts.to_host(self.state)
            names = self._state_names()
            self._prepared = Prepared(self.param_groups, self.state, self.options, names, only, on_device)
            self.backend = self._prepared.backend
        return self._prepared

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; with a stash, those of every version."""
        if self.options.stash is not None:
            self.options.stash.zero_grad(set_to_none)
        else:
            super().zero_grad(set_to_none)

    def _coefficients(
        self, group: dict[str, Any], t: int, mu_product: float, scale: float
    ) -> tuple[Coefficients, float]:
        """The scalars of step ``t`` (from 1) of a group, and the new mu product.

        Where steps are counted on the device, ``t`` and ``mu_product`` are tensors of many, and so is what follows.
        """
        raise NotImplementedError

    def _row(self, step_class: StepClass, scale: float) -> tuple[Coefficients, float]:
        index, steps, mu_product = step_class
        return self._row_of(index, int(steps) + 1, mu_product, scale=scale)

    def _row_of(self, index: int, t: Any, mu_product: Any, *, scale: float) -> tuple[Coefficients, Any]:
        group = self.param_groups[index]
        try:
            row, product = self._coefficients(group, t, mu_product, -scale if group["maximize"] else scale)
            # A gradient that is not finite may make the scale so, as in torch; the hyper-parameters may not.
            known = [c for c in (*row[1:], product, group["lr"]) if not isinstance(c, Tensor)]
            finite = all(map(math.isfinite, known))
        except (KeyError, TypeError, ZeroDivisionError, OverflowError):
            finite = False
        if not finite:
            found = {key: group.get(key, "missing") for key in self.defaults}
            shown = ", ".join(f"{key}={value!r}" for key, value in found.items() if not isinstance(value, bool))
            raise ValueError(f"parameter group {index} cannot be stepped with {shown}; nothing has been updated")
        return row, product

    def _correction_of(self, index: int, t: Any, row: Coefficients) -> Correction:
        """The scalars of a group's correction in step ``t`` (from 1); ``row`` has those of its rule."""
        group, options = self.param_groups[index], self.options
        scalars = Correction() if options.correction is None else options.correction.scalars(t)
        if options.prediction is None:
            return scalars
        ahead = options.prediction.scalars(row, float(group.get("horizon", 1.0)))
        if options.correction is None:
            return ahead
        return scalars._replace(ahead_last=ahead.ahead_last, ahead_momentum=ahead.ahead_momentum)

    def _overflowed(self) -> bool:
        """Whether a ``GradScaler`` found gradients that are not finite."""
        found_inf = getattr(self, "found_inf", None)
        return found_inf is not None and float(found_inf) > 0.0

    # ------------------------------------------------------------------ parameters and their state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and "params" not in param_group:
            raise ValueError("a parameter group has no 'params'")
        super().add_param_group(param_group)
        parameters = self.param_groups[-1]["params"]
        try:
            self._check_group(parameters)
            self._init_state([p for p in parameters if p.requires_grad])
        except BaseException:  # out of memory too
            del self.param_groups[-1]
            raise
        self._prepared = None
        if self._ready:
            self._warn_of_reference(stacklevel=3)

    def _warn_of_reference(self, stacklevel: int) -> None:
        only = self._only_reference()
        if only is not None and self.options.backend == "auto" and not self._warned:
            self._warned = True
            warnings.warn(f"{only} takes the slower reference backend", RuntimeWarning, stacklevel=stacklevel)

    def _check_group(self, parameters: list[Tensor]) -> None:
        if len({id(p) for p in parameters}) < len(parameters):
            raise ValueError("a parameter group has the same parameter twice; a step would count it once")
        for p in parameters:
            if p.requires_grad or p.is_floating_point():
                self.options.check_parameter(p)
        if self.options.stash is not None:
            self.options.stash.leaves(parameters, complete=False)

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Parameters that something put others in the place of before their first step have no entry."""
        self._forget_replaced()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load ours or torch's ``state_dict``, keeping state that was saved in float32 or bfloat16 in that dtype.

        ``torch.optim.Optimizer`` casts all state but ``step`` to the parameter's dtype, which would round the scalars
        and moments of low-precision parameters and make a resumed run differ. State of float64 parameters is cast.

        Raises:
            ValueError: it is of other parameters or of another optimizer; nothing has been changed.
        """
        checkpoint.check_form(state_dict)
        loaded: dict[str, Any] = {}

        def note(_: Optimizer, state: dict[str, Any]) -> None:  # after all hooks that may change it
            needed = [key for key in self.defaults if key not in self._legacy]
            checkpoint.check_fits(state, self.param_groups, needed, self._state_names())
            loaded.update(state)

        handle = self.register_load_state_dict_pre_hook(note)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        checkpoint.keep_dtypes(loaded, self._parameters(), self.state)
        (counts.to_devices if self._capturable() else counts.to_host)(self.state)
        counts.lay_side_by_side(self.state)
        for p in self._parameters():
            if not self.options.has_master(p) and p in self.state:
                self.state[p].pop("master_weight", None)
        self._prepared = None

    @property
    def max_grad_norm(self) -> float | None:
        """The limit that the gradients' global norm is clipped to; None for no clipping."""
        return self.options.max_grad_norm

    def _state_names(self) -> list[str]:
        """What every parameter's state has."""
        names = ["step"] + ["mu_product"] * self._has_mu_product + ["exp_avg"] + ["exp_avg_sq"] * self._adaptive
        return names if self.options.mean_name is None else [*names, self.options.mean_name]

    def _init_state(self, parameters: list[Tensor]) -> None:
        entries = fresh_state(parameters, self._state_names(), self.options, on_device=self._capturable())
        for i, p in enumerate(parameters):
            self.state[p].update({name: values[i] for name, values in entries.items()})

    def _forget_replaced(self) -> None:
        """Drop the state, and with it the parameters, that are in no group any more and were never stepped."""
        kept = {id(p) for p in self._parameters()}
        for p in [p for p in self.state if isinstance(p, Tensor) and id(p) not in kept]:
            if float(self.state[p].get("step", 1.0)) == 0.0:
                del self.state[p]

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _capturable(self) -> bool:
        return any(group.get("capturable") for group in self.param_groups)

    def _counts_on_device(self) -> bool:
        """Whether steps are counted where the parameters are: as asked for, or not to wait for a ``GradScaler``."""
        if self._capturable():
            return True
        scaled = hasattr(self, "found_inf") and self.backend in DEVICE_BACKENDS
        return scaled and not self._counted_by_host and needs_host(self.options, self._parameters()) is None

    def _only_reference(self) -> str | None:
        """An option in use that only the reference backend has."""
        if self.defaults.get("differentiable"):
            return "differentiable=True"
        return "amsgrad=True" if any(group.get("amsgrad") for group in self.param_groups) else None

    # ------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        if self.options.stash is not None:
            raise TypeError(
                "an optimizer with a WeightStash cannot be copied or pickled; save its state_dict() and the stash's"
            )
        kept = ("options", "backend", "_step_supports_amp_scaling")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepared = None
        self.__dict__.setdefault("last_grad_norm", None)
        self._ready = self._warned = True
        for group in self.param_groups:
            for key, value in self._legacy.items():
                group.setdefault(key, value)
        counts.to_tensors(self.state)
