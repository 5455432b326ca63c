"""Plain tensors for parameters that are not: what a step passes over in this process."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import TypeIs

from nesterov_pp.kernels.raw import has_memory, why_not_raw
from nesterov_pp.kernels.reference import widened

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(t: object) -> TypeIs[DTensor]:
    """Whether ``t`` is a ``DTensor``, without importing their slow module where nobody has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def is_plain(t: Tensor) -> bool:
    """Whether a step can pass over the tensor as it is."""
    return not is_dtensor(t) and not t.is_complex() and not t.is_neg()


def is_resolved(t: Tensor) -> bool:
    """Whether ``local(t)`` is a copy, since ``t`` is negated or conjugated lazily: its memory holds other values."""
    return bool(t.is_conj() or t.is_neg())


@torch.no_grad()
def local(t: Tensor) -> Tensor:
    """The real elements of ``t`` that are in this process, sharing its memory unless it ``is_resolved``: ``t`` itself
    where it is plain, else the shard of a ``DTensor`` (empty on some ranks) or the view of a complex tensor with a last
    dimension of two."""
    if is_dtensor(t):
        t = t.to_local().detach()
    if is_resolved(t):
        if not has_memory(t):
            raise ValueError(
                f"a tensor of shape {tuple(t.shape)} has a storage smaller than its shape (resized, or freed)"
            )
        t = t.detach().resolve_conj().resolve_neg()
    if t.is_complex():
        t = torch.view_as_real(t.detach())
    return t


@torch.no_grad()
def write_back(t: Tensor, resolved: Tensor) -> None:
    """Write what ``local`` gave, of a tensor that ``is_resolved``, and a step has changed."""
    t.copy_(torch.view_as_complex(resolved) if t.is_complex() else resolved)


@torch.no_grad()
def materialised(grad: Tensor, like: Tensor, name: str) -> Tensor:
    """The values of a gradient that is no plain tensor, laid out as its parameter ``like``.

    Raises:
        ValueError: torch's own step would not take such a gradient either, or not for this parameter.
    """
    try:
        torch.zeros_like(like).lerp_(grad, 0.5)  # the first thing that torch's step does with it
        plain = torch.empty_like(like, requires_grad=False).copy_(grad)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"the gradient of {name} {why_not_raw(grad)}, and cannot update the parameter: {str(error).splitlines()[0]}"
        ) from error
    if why_not_raw(plain) is not None:
        raise ValueError(f"the gradient of {name} {why_not_raw(grad)}, and the parameter does not")
    return plain


def local_gradient(p: Tensor) -> Tensor | None:
    """The gradient of ``p``, placed as ``p`` is, as ``local`` gives it."""
    grad = p.grad
    if is_dtensor(p) and is_dtensor(grad) and grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    return None if grad is None else local(grad)


def global_norm(grads: list[Tensor]) -> float:
    """Euclidean norm of all gradients over all processes that share them; every one of these has to call this."""
    by_mesh: dict[object, list[Tensor]] = {}
    for grad in grads:
        by_mesh.setdefault(grad.device_mesh if is_dtensor(grad) else None, []).append(grad)
    norms = []
    for mesh_grads in by_mesh.values():
        norm = torch.nn.utils.get_total_norm([widened(grad) for grad in mesh_grads])
        norms.append(float(norm.full_tensor() if is_dtensor(norm) else norm))
    return math.hypot(*norms)
