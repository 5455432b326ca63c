"""Plain tensors in place of parameters that are not plain, for a step in this process to pass over."""

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
    """Return whether ``t`` is a ``DTensor``, without importing its module, which is slow, if nobody else has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def is_plain(t: Tensor) -> bool:
    """Return whether a step can pass over the tensor as it is."""
    return not is_dtensor(t) and not t.is_complex() and not t.is_neg()


def is_resolved(t: Tensor) -> bool:
    """Return whether ``local(t)`` is a copy: memory holds other values if ``t`` is negated or conjugated lazily."""
    return bool(t.is_conj() or t.is_neg())


@torch.no_grad()
def local(t: Tensor) -> Tensor:
    """Return the real elements of ``t`` in this process, sharing its memory unless ``is_resolved(t)``.

    This is ``t`` itself if it is plain, else the shard of a ``DTensor`` (empty on some ranks) or the view of a complex
    tensor as a real one with a last dimension of two.
    """
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
    """Write ``resolved``, the copy that ``local`` made of ``t`` and a step has changed, back to ``t``."""
    t.copy_(torch.view_as_complex(resolved) if t.is_complex() else resolved)


@torch.no_grad()
def materialised(grad: Tensor, like: Tensor, name: str) -> Tensor:
    """Return the values of a gradient that is not a plain tensor, laid out like its parameter ``like``.

    Raises:
        ValueError: torch's own step would not take such a gradient either, or not for this parameter.
    """
    try:
        torch.zeros_like(like).lerp_(grad, 0.5)  # the first thing that torch's step does with a gradient
        plain = torch.empty_like(like, requires_grad=False).copy_(grad)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"the gradient of {name} {why_not_raw(grad)}, and cannot update the parameter: {str(error).splitlines()[0]}"
        ) from error
    if why_not_raw(plain) is not None:
        raise ValueError(f"the gradient of {name} {why_not_raw(grad)}, but the parameter does not")
    return plain


def local_gradient(p: Tensor) -> Tensor | None:
    """Return the gradient of ``p``, with the placements of ``p``, as ``local`` gives it; None if there is none."""
    grad = p.grad
    if is_dtensor(p) and is_dtensor(grad) and grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    return None if grad is None else local(grad)


def global_norm(grads: list[Tensor]) -> float:
    """Return the Euclidean norm of all gradients over all processes that share them; each of these has to call this."""
    by_mesh: dict[object, list[Tensor]] = {}
    for grad in grads:
        by_mesh.setdefault(grad.device_mesh if is_dtensor(grad) else None, []).append(grad)
    norms = []
    for mesh_grads in by_mesh.values():
        norm = torch.nn.utils.get_total_norm([widened(grad) for grad in mesh_grads])
        norms.append(float(norm.full_tensor() if is_dtensor(norm) else norm))
    return math.hypot(*norms)
