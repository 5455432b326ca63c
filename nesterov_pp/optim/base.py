"""The step that all optimizers share: gather the tensors, compute the scalars, run one pass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import ParamsT

from nesterov_pp.kernels import Coefficients, Correction, Normaliser, StepClass, StepSlots, choose_backend
from nesterov_pp.kernels.raw import in_fake_mode, in_transform
from nesterov_pp.optim import counts
from nesterov_pp.optim.device_counts import check_capturable, check_not_captured
from nesterov_pp.optim.fresh import follow_layouts
from nesterov_pp.optim.local import local
from nesterov_pp.optim.options import Options, check_fake, check_fused
from nesterov_pp.optim.prepared import Prepared
from nesterov_pp.optim.scaling import forget_scale_on_failure, gradient_scale, whole_scale
from nesterov_pp.optim.state import StatefulOptimizer, unique
from nesterov_pp.optim.uninterrupted import uninterrupted


class FusedOptimizer(StatefulOptimizer):
    """An optimizer whose whole step is one pass over all its tensors.

    Subclasses declare their state and turn a parameter group and a step count into ``Coefficients``.
    """

    # If True, torch.amp.GradScaler leaves unscaling to the step and sets grad_scale and found_inf around it.
    _step_supports_amp_scaling = False
    _ready = False  # True once the constructor has added all its groups
    _warned = False
    family: ClassVar[str] = "adam"
    _no_sparse: ClassVar[str] = "NAG does not support sparse gradients"

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], options: Options, *, fused: bool | None = None
    ) -> None:
        # With a stash, the scaler would unscale one version's gradients and have another's stepped. Set this way, the
        # step sees the scaler and refuses it.
        if fused or options.stash is not None:
            self._step_supports_amp_scaling = True
        self.last_grad_norm: Tensor | None = None
        super().__init__(params, defaults, options, fused=fused)
        if options.stash is not None:
            options.stash.leaves(self._parameters())
        plain = [local(p) for p in unique(self._parameters()) if p.requires_grad and not is_lazy(p)]
        self.backend = choose_backend(options.backend, plain, self._only_reference())
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
            closure: function that re-evaluates the model and returns the loss, as in ``torch.optim``.
            version: with a stash, the version whose gradients the step takes (and clears). The step reads the newest
                weights and writes version ``stash.newest + 1``. Default: the newest version.
            microbatches: number of microbatches summed into the gradients; the step uses their mean. Default: 1.

        Raises:
            ValueError: a tensor, the version or a group's hyper-parameter is invalid; nothing has been changed.
            FloatingPointError: a gradient is not finite and ``on_nonfinite="raise"``; nothing has been changed.
            RuntimeError: a gradient is sparse; nothing has been changed.

        With ``fused=True`` the pass unscales the gradients of a ``torch.amp.GradScaler`` without rewriting them. A
        step whose gradients overflowed changes nothing, not even the step count.
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

    # The pass is one call into C++: a compiler has nothing to fuse in it, and would recompile whenever lr changes.
    # Disabled as in torch.optim, because torch.compiler.disable imports the compiler at once and doubles import time.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _one_pass(self, version: int | None, microbatches: int) -> None:
        with self._lock:
            try:
                self._locked_pass(version, microbatches)
            finally:
                if self._prepared is not None:
                    self._prepared.plan.forget()  # drop the gradients of a step that was not run
                if self.options.stash is not None:
                    self.options.stash.drop_step()

    def _locked_pass(self, version: int | None, microbatches: int) -> None:
        stash = self.options.stash
        slots = StepSlots()
        if stash is not None:
            if hasattr(self, "found_inf"):
                raise ValueError(
                    "torch.amp.GradScaler sees the gradients of one weight version only; "
                    "use bfloat16, which needs no scaling, with a WeightStash"
                )
            slots = StepSlots(*stash.begin_step(version, microbatches, over_gradients=not self.options.corrects))
        elif version is not None:
            raise ValueError(f"step(version={version}) needs an optimizer built with stash=WeightStash(...)")
        if in_fake_mode():
            check_fake(self._parameters())
        if self._capturable():
            check_capturable(self.param_groups, self.options, self.backend, has_mu_product=self._has_mu_product)
        else:
            check_not_captured(type(self).__name__)
        prepared, classes = self._collect(slots)
        if prepared.device_counts is None and self._overflowed():
            return
        loss_scale = getattr(self, "grad_scale", None)
        if self.defaults.get("differentiable") and loss_scale is None and self.options.are_torchs and self._recorded():
            return
        scale, norm = gradient_scale(prepared, self.options, slots.grads, microbatches, loss_scale)
        if norm is not None:
            self.last_grad_norm = norm
        with nullcontext() if stash is None and prepared.device_counts is None else uninterrupted():
            self._run(prepared, classes, slots, scale, None if stash is None else (version, microbatches))
        for repeated in prepared.repeats:
            again = self._plan_of(repeated)
            self._run(again, again.collect(slots), slots, whole_scale(prepared, self.options, scale, norm, loss_scale))

    def _run(
        self,
        prepared: Prepared,
        classes: list[StepClass],
        slots: StepSlots,
        scale: float,
        of_ring: tuple[int | None, int] | None = None,
    ) -> None:
        """Run the pass over the collected tensors and count it.

        ``of_ring``: the version and the number of microbatches of a step with a stash.
        """
        stash, run_before = self.options.stash, prepared.plan.steps_run
        try:
            self._pass(prepared, classes, slots, scale)
            prepared.written(slots.target)
        finally:
            # Once the pass has run, weights, moments and counts are those of the next version, whatever fails then.
            if stash is not None and of_ring is not None and prepared.plan.steps_run > run_before:
                stash.end_step(*of_ring)

    def _pass(self, prepared: Prepared, classes: list[StepClass], slots: StepSlots, scale: float) -> None:
        if prepared.device_counts is not None:
            on_device, count = prepared.device_counts.next_step(
                prepared.stepped(slots.grads),
                partial(self._row_of, scale=scale),
                self._correction_of if self.options.corrects else None,
                getattr(self, "found_inf", None),
            )
            prepared.masters.follow(slots.source)
            with self._writing():
                prepared.plan.apply_rows(on_device)
            count()
        else:
            rows, products = [], []
            for step_class in classes:
                row, product = self._row(step_class, scale)
                rows.append(row)
                products.append(product)
            prepared.masters.follow(slots.source)
            corrections: list[Correction] = []
            if self.options.corrects:
                pairs = zip(classes, rows, strict=True)
                corrections = [self._correction_of(group, int(steps) + 1, row) for (group, steps, _), row in pairs]
            with self._writing():
                prepared.plan.apply(rows, products, corrections)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Tell the ring if the pass fails half way, as it does where there is no memory for what it computes."""
        try:
            yield
        except BaseException:
            if self.options.stash is not None:
                self.options.stash.drop_step(half_way=True)
            raise

    def _collect(self, slots: StepSlots) -> tuple[Prepared, list[StepClass]]:
        """Return the parameters as they are now, with the gradients of this step checked and collected."""
        before = self._prepared
        try:
            prepared = self._prepare()
            return prepared, prepared.collect(slots)
        except ValueError:
            self._check_sparse(slots.grads)
            # The earlier plan may not fit a parameter that has changed in place since.
            stale = before is not None and self._prepared is before
            if not follow_layouts(self._parameters(), self.state) and not stale:
                raise
        self._prepared = None
        prepared = self._prepare()
        return prepared, prepared.collect(slots)

    def _prepare(self) -> Prepared:
        only, on_device = self._only_reference(), self._counts_on_device()
        if self._prepared is None or not self._prepared.holds(self.param_groups, self.state, only, on_device):
            self._prepared = None  # frees memory that the next one may need
            with_gradient = [p for p in unique(self._parameters()) if p.grad is not None]
            self._check_sparse()
            if self.fused:
                check_fused(with_gradient)
            self._follow_parameters()
            new = [p for p in with_gradient if not self.state.get(p)]
            for p, options in zip(new, self._options_of(new), strict=True):
                options.check_parameter(p)
            self._init_state(new)
            (counts.to_devices if on_device else counts.to_host)(self._states())
            self._prepared = self._plan_of(self.param_groups)
            self.backend = self._prepared.backend
        prepared: Prepared = self._prepared
        return prepared

    def _plan_of(self, groups: list[dict[str, Any]]) -> Prepared:
        only, on_device = self._only_reference(), self._counts_on_device()
        names = self._state_names()
        return Prepared(groups, self.state, self.options, names, self._normaliser, only, on_device)

    def _check_sparse(self, slot: int = 0) -> None:
        """Refuse sparse gradients in torch's words, not with a message about their layout."""
        stash = self.options.stash
        leaves = self._parameters() if stash is None else stash.leaves(self._parameters())[slot]
        if any(p.grad is not None and p.grad.is_sparse for p in leaves):
            raise RuntimeError(self._no_sparse)

    def _recorded(self) -> bool:
        """Run torch's own step, which autograd records; return False for a rule that torch does not have."""
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; with a stash, the gradients of every version."""
        if self.options.stash is not None:
            self.options.stash.zero_grad(set_to_none)
        else:
            super().zero_grad(set_to_none)

    def _coefficients(
        self, group: dict[str, Any], t: int, mu_product: float, scale: float
    ) -> tuple[Coefficients, float]:
        """Return the scalars of step ``t`` (from 1) of a group, and the new product of mu.

        If steps are counted on the device, ``t`` and ``mu_product`` are tensors with one element for each of several
        parameters, and so are the values computed from them.
        """
        raise NotImplementedError

    def _row(self, step_class: StepClass, scale: float) -> tuple[Coefficients, float]:
        index, steps, mu_product = step_class
        return self._row_of(index, int(steps) + 1, mu_product, scale=scale)

    def _row_of(self, index: int, t: Any, mu_product: Any, *, scale: float) -> tuple[Coefficients, Any]:
        group = self.param_groups[index]
        try:
            row, product = self._coefficients(group, t, mu_product, -scale if group["maximize"] else scale)
            # A gradient that is not finite may make the scale non-finite, as in torch; hyper-parameters may not.
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
        """Return the scalars of a group's correction in step ``t`` (from 1); ``row`` holds those of its rule."""
        group, options = self.param_groups[index], self.options
        scalars = Correction() if options.correction is None else options.correction.scalars(t)
        if options.prediction is None:
            return scalars
        reach = row.inv_bias2 if self._normaliser == Normaliser.SIGN else row.c_grad + row.c_momentum
        ahead = options.prediction.scalars(reach, float(group.get("horizon", 1.0)))
        if options.correction is None:
            return ahead
        return scalars._replace(ahead_last=ahead.ahead_last, ahead_momentum=ahead.ahead_momentum)

    def _overflowed(self) -> bool:
        """Return whether a ``GradScaler`` found gradients that are not finite."""
        found_inf = getattr(self, "found_inf", None)
        return found_inf is not None and float(found_inf) > 0.0

    def _only_reference(self) -> str | None:
        """Return an option in use that only the reference backend supports, or None."""
        if self.defaults.get("differentiable"):
            return "differentiable=True"
        if in_transform():
            return "transforms of torch.func"
        return "amsgrad=True" if any(group.get("amsgrad") for group in self.param_groups) else None

    def _warn_of_reference(self, stacklevel: int) -> None:
        only = self._only_reference()
        if only is not None and self.options.backend == "auto" and not self._warned and not in_transform():
            self._warned = True
            warnings.warn(f"{only} uses the slower reference backend", RuntimeWarning, stacklevel=stacklevel)

    @property
    def max_grad_norm(self) -> float | None:
        """The limit that the gradients' global norm is clipped to; None for no clipping."""
        return self.options.max_grad_norm

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self._ready:
            self._warn_of_reference(stacklevel=3)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("last_grad_norm", None)
        self._ready = self._warned = True
