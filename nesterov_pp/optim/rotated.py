"""NAdam and AdamW in the eigenbasis of each matrix's gradient covariances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nesterov_pp.kernels import Coefficients, StepSlots, choose_backend
from nesterov_pp.optim import bases, counts
from nesterov_pp.optim.adamw import adamw_coefficients
from nesterov_pp.optim.local import is_dtensor
from nesterov_pp.optim.nadam import nadam_coefficients
from nesterov_pp.optim.options import LOW_PRECISION, SPLIT, Options, check_hyperparameters, learning_rate, two_betas
from nesterov_pp.optim.stacks import RotatedTensors, Stack, refresh
from nesterov_pp.optim.state import StatefulOptimizer, unique
from nesterov_pp.optim.uninterrupted import uninterrupted
from nesterov_pp.stash import WeightStash


class _Float32State(Options):
    def moment_dtype(self, p: Tensor) -> torch.dtype:
        return torch.float32 if p.dtype in LOW_PRECISION else p.dtype

    def check_parameter(self, p: Tensor) -> None:
        super().check_parameter(p)
        if self.state_dtype is not None or self.master_weights == SPLIT:
            raise ValueError("rotated optimizers have float32 moments, and float32 master weights or none")
        if is_dtensor(p) or p.is_complex():
            kind = "a DTensor" if is_dtensor(p) else "complex"
            raise ValueError(f"a parameter is {kind}; rotated optimizers only step real, unsharded parameters")


class RotatedOptimizer(StatefulOptimizer):
    """A one-pass rule in the eigenbasis of each matrix's gradient covariances.

    Subclasses turn a parameter group and a step count into ``Coefficients``, as those of ``FusedOptimizer`` do.
    """

    family: ClassVar[str] = "rotated"
    _no_sparse = "rotated optimizers do not support sparse gradients"

    def __init__(self, params: ParamsT, defaults: dict[str, Any], options: Options) -> None:
        for name in ("refresh_every", "covariance_every", "block_size"):
            if not isinstance(defaults[name], int) or defaults[name] < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {defaults[name]!r}")
        self.last_grad_norm: Tensor | None = None
        super().__init__(params, defaults, options)
        stash = options.stash
        if stash is not None:
            stash.leaves(self._parameters())
            stash.attach(self)
        trained = [p for p in self._parameters() if p.requires_grad]
        self.backend = choose_backend(options.backend, trained)
        if not any(p.is_meta for p in trained):
            self._prepare()  # allocates the bases, too

    # ------------------------------------------------------------------ the step

    @overload
    def step(self, closure: None = ..., *, version: int | None = ..., microbatches: int = ...) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, version: int | None = ..., microbatches: int = ...) -> float: ...

    @torch.no_grad()
    def step(
        self, closure: Callable[[], float] | None = None, *, version: int | None = None, microbatches: int = 1
    ) -> float | None:
        """Perform one step.

        Args:
            closure: reevaluates the model and returns the loss, as in ``torch.optim``.
            version, microbatches: as for ``NAdam.step``.

        Raises:
            ValueError: a tensor, a version or a hyper-parameter does not fit; nothing has been changed.
            FloatingPointError: the first gradient of a matrix is not finite; nothing has been changed.
            RuntimeError: a gradient is sparse; nothing has been changed.
        """
        if not isinstance(microbatches, int) or microbatches < 1:
            raise ValueError(f"microbatches must be a whole number of at least 1, not {microbatches}")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._lock:
            try:
                self._locked_step(version, microbatches)
            finally:
                if self.options.stash is not None:
                    self.options.stash.drop_step()
        return loss

    def _locked_step(self, version: int | None, microbatches: int) -> None:
        stash, slots = self.options.stash, StepSlots()
        if stash is not None:
            slots = StepSlots(*stash.begin_step(version, microbatches))
        elif version is not None:
            raise ValueError(f"step(version={version}) needs an optimizer built with stash=WeightStash(...)")
        prepared = self._prepare()
        prepared.follow(slots.source)
        prepared.follow(slots.target)
        self._check_gradients(prepared, slots.grads)
        prepared.tell(slots.grads)
        classes = prepared.plan.collect(slots)
        scale = self._scale(prepared, slots.grads, microbatches)
        rows, products = [], []
        for number, steps, mu_product in classes:
            group, rotated = self.param_groups[number // 2], number % 2 == 1
            sign = -1.0 if group["maximize"] else 1.0
            row, product = self._coefficients(group, int(steps) + 1, mu_product, sign * (1.0 if rotated else scale))
            rows.append(row._replace(decay=0.0, l2=0.0) if rotated else row)
            products.append(product)
        parts = [part for stack in prepared.stacks for part in self._parts(stack, prepared, slots.grads)]
        with uninterrupted():
            prepared.masters.follow(slots.source)
            for part in parts:
                self._rotate(part, prepared, slots.grads, scale)
            prepared.plan.apply(rows, products)
            for stack in prepared.stacks:
                self._add(stack, prepared, slots)
            prepared.masters.written(slots.target)
            if stash is not None:
                stash.end_step(version, microbatches)
                prepared.follow(slots.target)

    def _check_gradients(self, prepared: RotatedTensors, slot: int) -> None:
        """Refuse gradients that the products could not take, before anything is written."""
        if any(p.grad is not None and p.grad.layout != torch.strided for p in prepared.leaves[slot]):
            raise RuntimeError(self._no_sparse)
        for n in (matrix.number for stack in prepared.stacks for matrix in stack.matrices):
            grad = prepared.leaves[slot][n].grad
            if grad is None or float(self.state[prepared.parameters[n]]["step"]) > 0:
                continue
            if not bool(torch.isfinite(grad).all()):
                raise FloatingPointError(
                    f"the first gradient of parameter {n} is not finite, so it has no eigenbasis; "
                    "nothing has been updated"
                )

    def _scale(self, prepared: RotatedTensors, slot: int, microbatches: int) -> float:
        """Return the factor of the gradients: their mean over microbatches, and clipping by their global norm."""
        limit, scale = self.options.max_grad_norm, 1.0 / microbatches
        if limit is None:
            return scale
        norm = torch.nn.utils.get_total_norm([p.grad for p in prepared.leaves[slot] if p.grad is not None]) * scale
        self.last_grad_norm = norm.double().cpu()
        factor = limit / (float(norm) + 1e-6)
        return scale if factor >= 1.0 else scale * factor

    def _parts(self, stack: Stack, prepared: RotatedTensors, slot: int) -> list[Stack]:
        """Return the stack, or its matrices one by one if not all have gradients or have been stepped as often."""
        with_gradient = [m for m in stack.matrices if prepared.leaves[slot][m.number].grad is not None]
        steps = {float(self.state[prepared.parameters[m.number]]["step"]) for m in with_gradient}
        if len(with_gradient) == len(stack.matrices) and len(steps) == 1:
            return [stack]
        return [stack.part(m) for m in with_gradient]

    def _rotate(self, stack: Stack, prepared: RotatedTensors, slot: int, scale: float) -> None:
        """Update covariances and bases, and rotate the gradients for the pass."""
        group = self.param_groups[stack.group]
        states = [self.state[prepared.parameters[m.number]] for m in stack.matrices]
        leaves = prepared.leaves[slot]
        torch._foreach_copy_(stack.cut_gradients, [m.cut(leaves[m.number].grad) for m in stack.matrices])  # type: ignore[arg-type]
        grads = stack.gradients
        if scale != 1.0:
            grads.mul_(scale)
        t, every = int(states[0]["step"]) + 1, group["covariance_every"]
        if t == 1 or t % every == 0:
            beta2 = two_betas(group["betas"])[1]
            for side, covariance in stack.covariances.items():
                bases.add_covariance(covariance, grads, side, beta2**every)
        if t == 1:
            for side, basis in stack.bases.items():
                basis.copy_(bases.first_basis(stack.covariances[side]))
        elif bases.is_refreshed(t, group["refresh_every"]):
            refresh(stack, states)
        bases.rotate(grads, stack.bases, out=grads)

    def _add(self, stack: Stack, prepared: RotatedTensors, slots: StepSlots) -> None:
        """Rotate the step back and add it to the weights, decayed: ``(1 - lr wd) W + U step V^T``."""
        group = self.param_groups[stack.group]
        kept = 1.0 - learning_rate(group["lr"], 1) * group["weight_decay"]
        bases.rotate_back(stack.step, stack.bases, out=stack.gradients)
        source, target = prepared.cut_weights[slots.source], prepared.cut_weights[slots.target]
        for matrix, move in zip(stack.matrices, stack.cut_gradients, strict=True):
            old, new = source[matrix.number], target[matrix.number]
            master = prepared.cut_masters.get(matrix.number)
            if prepared.leaves[slots.grads][matrix.number].grad is None:
                if slots.source != slots.target:
                    new.copy_(old)
            elif master is not None:
                new.copy_(torch.add(move, master, alpha=kept, out=master))
            elif new.dtype == move.dtype:
                torch.add(move, old, alpha=kept, out=new)
            else:
                new.copy_(torch.add(move, old, alpha=kept))
        stack.step.zero_()

    # ------------------------------------------------------------------ what a step goes over

    def _prepare(self) -> RotatedTensors:
        if self._prepared is None or not self._prepared.snapshot.holds(self.param_groups, self.state):
            self._prepared = None
            self._follow_parameters()
            missing = [p for p in unique(self._parameters()) if p.requires_grad and not self.state.get(p)]
            for p in missing:
                self.options.check_parameter(p)
            self._init_state(missing)
            counts.to_host(self._states())
            self._prepared = RotatedTensors(
                self.param_groups, self.state, self.options, has_mu_product=self._has_mu_product
            )
            self.backend = self._prepared.backend
        prepared: RotatedTensors = self._prepared
        return prepared

    def _coefficients(
        self, group: dict[str, Any], t: int, mu_product: float, scale: float
    ) -> tuple[Coefficients, float]:
        raise NotImplementedError


class RotatedNAdam(RotatedOptimizer):
    """NAdam's look-ahead in the eigenbasis of each matrix's gradient covariances (arXiv 2505.01099 in the basis of
    arXiv 2602.03515). For a matrix W (m x n) with gradient G, and NAdam's ``mu_t`` and ``Pi_t`` (see ``NAdam``)::

        L = beta2 L + (1 - beta2) G G^T        R = beta2 R + (1 - beta2) G^T G
        at the first step, and every refresh_every steps, new U and V (below)
        G' = U^T G V        M = beta1 M + (1 - beta1) G'        V2 = beta2 V2 + (1 - beta2) G'^2
        D = sqrt(V2 / (1 - beta2^t)) + eps
        W = (1 - lr wd) W - lr U [ ((1 - mu_t) / (1 - Pi_t) G' + mu_{t+1} / (1 - Pi_{t+1}) M) / D ] V^T

    U holds the eigenvectors of L and V those of R: at first from ``eigh``, then from one step of power iteration,
    ``QR(L U)``, with the columns sorted by ``diag(U^T L U)``. At a refresh V2 is permuted like the columns, and M is
    rotated to the new bases, so it is the rotated mean of the gradients.

    A side longer than ``block_size`` is cut into equal blocks of between half that length and that length, and each
    block of the matrix is rotated like a matrix of its own. A side that cannot be cut so is not rotated. Tensors that
    are not matrices are stepped by plain NAdam. Blocks of side b take ``8 b`` operations a parameter and step, beside
    6 for each token of the step in forward and backward; covariances take ``4 b`` more and new bases about ``20 b``,
    in the steps that have them.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate (default: 3e-3).
        betas: decay rates of the two moments; the second one also of the covariances (default: (0.99, 0.99)).
        eps: term added to the denominator (default: 1e-8).
        weight_decay: rate of the decoupled weight decay (default: 1e-2).
        momentum_decay: psi of NAdam (default: 4e-3).
        refresh_every: longest time between new bases, in steps (default: 10). At first it is a tenth of the steps so
            far, since gradients change fastest at the beginning.
        covariance_every: time between gradients that the covariances take, in steps; their decay rate is then ``beta2``
            to this power (default: 1).
        block_size: longest side of a block that is rotated (default: 1024).
        maximize: ascend instead of descend (default: False).
        stash: ring of weight versions to read from and write to (default: None, the parameters are updated in place).
        max_grad_norm: clip the gradients to this global norm (default: None, no clipping). ``last_grad_norm`` holds the
            last norm.
        master_weights: keep and step a float32 copy of bfloat16 and float16 parameters, as in ``NAdam`` (default:
            False).
        backend: of the element-wise pass, as for ``NAdam`` (default: "auto").

    A group's ``"horizon"`` is the number of updates that the look-ahead reaches ahead (default: 1). The state of
    float16 and bfloat16 parameters is float32. Beside the moments it holds ``2 (m^2 + n^2)`` numbers for each
    m x n matrix or block. The moments of a matrix that is cut lie block by block.

    Raises:
        ValueError: a hyper-parameter is out of range, a parameter is complex or a ``DTensor``, the backend cannot be
            used, or the parameters are not those of the stash.
    """

    _has_mu_product: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.99, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        momentum_decay: float = 4e-3,
        *,
        refresh_every: int = 10,
        covariance_every: int = 1,
        block_size: int = 1024,
        maximize: bool = False,
        stash: WeightStash | None = None,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        backend: str = "auto",
    ) -> None:
        check_hyperparameters(lr=lr, eps=eps, betas=betas, weight_decay=weight_decay, momentum_decay=momentum_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "refresh_every": refresh_every,
            "covariance_every": covariance_every,
            "block_size": block_size,
            "maximize": maximize,
        }
        options = _Float32State(
            stash=stash, max_grad_norm=max_grad_norm, master_weights=master_weights, backend=backend
        )
        super().__init__(params, defaults, options)

    def _coefficients(
        self, group: dict[str, Any], t: int, mu_product: float, scale: float
    ) -> tuple[Coefficients, float]:
        horizon = float(group.get("horizon", 1.0))
        return nadam_coefficients(group, t, mu_product, decoupled=True, horizon=horizon, scale=scale)


class RotatedAdamW(RotatedOptimizer):
    """AdamW in the eigenbasis of each matrix's gradient covariances: basis rotation (arXiv 2602.03515, "2nd", "bi").

    The bases are those of ``RotatedNAdam``, and so are its other arguments. With ``V2`` and M as there::

        W = (1 - lr wd) W - lr U [ M / (1 - beta1^t) / (sqrt(V2 / (1 - beta2^t)) + eps) ] V^T

    Args:
        betas: decay rates of the two moments; the second one also of the covariances (default: (0.9, 0.999)).
        lr: learning rate (default: 1e-3).
        params, eps, weight_decay, refresh_every, covariance_every, block_size, maximize, stash, max_grad_norm,
            master_weights, backend: see ``RotatedNAdam``.

    Raises:
        ValueError: in the same cases as ``RotatedNAdam``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        refresh_every: int = 10,
        covariance_every: int = 1,
        block_size: int = 1024,
        maximize: bool = False,
        stash: WeightStash | None = None,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        backend: str = "auto",
    ) -> None:
        check_hyperparameters(lr=lr, eps=eps, betas=betas, weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "refresh_every": refresh_every,
            "covariance_every": covariance_every,
            "block_size": block_size,
            "maximize": maximize,
        }
        options = _Float32State(
            stash=stash, max_grad_norm=max_grad_norm, master_weights=master_weights, backend=backend
        )
        super().__init__(params, defaults, options)

    def _coefficients(
        self, group: dict[str, Any], t: int, mu_product: float, scale: float
    ) -> tuple[Coefficients, float]:
        return adamw_coefficients(group, t, scale=scale), mu_product
