"""The step in plain torch: any device, any floating dtype. It judges the other backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nesterov_pp.kernels.coefficients import Coefficients
from nesterov_pp.kernels.plan import StepClass, Tensors


def update(
    weight: Tensor,
    weight_out: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor | None,
    c: Coefficients,
) -> None:
    """One parameter's update (see ``Coefficients``), in fp32 for lower precisions; ``weight_out`` may be ``weight``."""
    dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
    w, m = weight.to(dtype), exp_avg.to(dtype)
    g = c.grad_scale * grad.to(dtype) + c.l2 * w
    m = m + c.beta1_complement * (g - m)
    direction = c.c_grad * g + c.c_momentum * m
    if exp_avg_sq is not None:
        v = exp_avg_sq.to(dtype)
        v = v + c.beta2_complement * (g * g - v)
        direction = direction / ((v * c.inv_bias2).sqrt() + c.eps)
        exp_avg_sq.copy_(v)
    exp_avg.copy_(m)
    weight_out.copy_(w - (c.decay * w + direction))


class ReferencePlan:
    """The reference backend's plan: a loop over parameters."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._slots = (0, 0)
        self._grads: list[Tensor | None] = []
        self._class_of: list[int] = []

    def collect(self, grads_of: int, source: int, target: int) -> list[StepClass]:
        t = self._tensors
        grads = [p.grad for p in t.slots[grads_of]]
        classes: dict[StepClass, int] = {}
        class_of = []
        for i, grad in enumerate(grads):
            weight = t.slots[source][i]
            beside = {
                "next version": t.slots[target][i],
                "gradient": grad,
                "first moment": t.exp_avgs[i],
            }
            if t.exp_avg_sqs:
                beside["second moment"] = t.exp_avg_sqs[i]
            for what, other in beside.items():
                if other is not None:
                    _check_beside(t.names[i], what, weight, other)
            mu_product = float(t.mu_products[i]) if t.mu_products else 1.0
            key = (t.groups[i], float(t.steps[i]), mu_product)
            class_of.append(classes.setdefault(key, len(classes)) if grad is not None else 0)
        self._slots, self._grads, self._class_of = (source, target), grads, class_of
        return list(classes)

    def gradient_norm(self) -> float:
        return float(torch.nn.utils.get_total_norm([grad for grad in self._grads if grad is not None]))

    def nonfinite_parameter(self) -> str:
        for name, grad in zip(self._tensors.names, self._grads, strict=True):
            if grad is not None and not bool(grad.isfinite().all()):
                return name
        return ""

    @torch.no_grad()
    def apply(self, rows: Sequence[Coefficients], mu_products: Sequence[float]) -> None:
        t = self._tensors
        source, target = self._slots
        for i, grad in enumerate(self._grads):
            weight, weight_out = t.slots[source][i], t.slots[target][i]
            if grad is None:
                if weight_out is not weight:
                    weight_out.copy_(weight)
                continue
            k = self._class_of[i]
            exp_avg_sq = t.exp_avg_sqs[i] if t.exp_avg_sqs else None
            update(weight, weight_out, grad, t.exp_avgs[i], exp_avg_sq, rows[k])
            t.steps[i].add_(1)
            if t.mu_products:
                t.mu_products[i].fill_(mu_products[k])
        self._grads = []


def _check_beside(name: str, what: str, weight: Tensor, other: Tensor) -> None:
    for attribute in ("layout", "device", "shape"):
        expected, found = getattr(weight, attribute), getattr(other, attribute)
        if expected != found:
            raise ValueError(f"the {what} of {name} has {attribute} {found}, but the parameter has {expected}")
    if what == "next version" and weight.dtype != other.dtype:
        raise ValueError(f"the {what} of {name} is {other.dtype}, but the parameter is {weight.dtype}")
