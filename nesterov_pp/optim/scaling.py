"""The factor by which a step multiplies its gradients."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from nesterov_pp.optim.local import global_norm
from nesterov_pp.optim.options import Options
from nesterov_pp.optim.prepared import Prepared


def gradient_scale(
    prepared: Prepared, options: Options, grads_of: int, microbatches: int, loss_scale: Tensor | None
) -> tuple[float, Tensor | None]:
    """Compute the factor for the mean over microbatches, the loss scale, and clipping by the gradients' global norm.

    The clipping factor is ``min(1, max_grad_norm / (norm + 1e-6))``, as in ``torch.nn.utils.clip_grad_norm_``. Plans on
    a device apply the loss scale and the clipping there. The norm is that of the collected gradients.

    Returns:
        The factor, and the norm in float64 if it was computed.

    Raises:
        FloatingPointError: the norm is not finite and ``on_nonfinite="raise"``.
    """
    limit, raises = options.max_grad_norm, options.on_nonfinite == "raise"
    if loss_scale is not None:
        loss_scale = loss_scale.detach().resolve_neg()
    if limit is None and loss_scale is None and not raises:
        return 1.0 / microbatches, None
    if _scales_on_device(prepared, options):
        return 1.0 / microbatches, prepared.plan.scale(1.0 / microbatches, limit, loss_scale)
    scale = 1.0 / (microbatches * (1.0 if loss_scale is None else float(loss_scale)))
    if limit is None and not raises:
        return scale, None
    if prepared.sharded:
        norm = global_norm([p.grad for p in prepared.leaves[grads_of] if p.grad is not None]) * scale
    else:
        norm = prepared.plan.gradient_norm() * scale
    if raises and not math.isfinite(norm):
        name = prepared.plan.nonfinite_parameter()
        if name or prepared.sharded:
            whose = f"the gradient of {name}" if name else "a gradient on another rank"
            raise FloatingPointError(f"{whose} is not finite; nothing has been updated")
    factor = 1.0 if limit is None else limit / (norm + 1e-6)
    # A norm that is NaN makes every gradient NaN, as in torch.
    return scale if factor >= 1.0 else scale * factor, torch.tensor(norm, dtype=torch.float64, device="cpu")


def _scales_on_device(prepared: Prepared, options: Options) -> bool:
    return prepared.plan.on_device and options.on_nonfinite != "raise" and not prepared.sharded


def whole_scale(
    prepared: Prepared, options: Options, scale: float, norm: Tensor | None, loss_scale: Tensor | None
) -> float:
    """Return the whole factor that a step applied to its gradients, given what ``gradient_scale`` returned.

    Waits for the device if the plan has applied a part of the factor there.
    """
    if not _scales_on_device(prepared, options):
        return scale
    limit = options.max_grad_norm
    factor = 1.0 if limit is None or norm is None else min(1.0, limit / (float(norm) + 1e-6))
    return scale * factor / (1.0 if loss_scale is None else float(loss_scale))


def forget_scale_on_failure(optimizer: type[Optimizer]) -> None:
    """Make a class's ``step``, hooks and closure included, remove ``grad_scale`` and ``found_inf`` when it fails.

    ``torch.amp.GradScaler`` deletes them only after a step that returned; left behind, they would scale the next step.
    """
    step = optimizer.step
    if getattr(step, "forgets_scale", False):
        return

    @functools.wraps(step)
    def forgetting(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            return step(self, *args, **kwargs)
        except BaseException:
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise

    forgetting.forgets_scale = True  # type: ignore[attr-defined]
    optimizer.step = forgetting  # type: ignore[method-assign]
