"""Plain tensors for parameters that are not: what a step passes over in this process."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import TypeIs

from nesterov_pp.kernels.reference import widened

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(t: object) -> TypeIs[DTensor]:
    """Whether ``t`` is a ``DTensor``, without importing their slow module where nobody has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def is_plain(t: Tensor) -> bool:
    """Whether a step can pass over the tensor as it is."""
    return not is_dtensor(t) and not t.is_complex()


@torch.no_grad()
def local(t: Tensor) -> Tensor:
    """The real elements of ``t`` that are in this process, sharing its memory: ``t`` itself where it is plain, else the
    shard of a ``DTensor`` (empty on some ranks) or the view of a complex tensor with a last dimension of two."""
    if is_dtensor(t):
        t = t.to_local().detach()
    if t.is_complex():
        t = torch.view_as_real(t.detach().resolve_conj())
    return t


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
