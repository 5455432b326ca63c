"""Eigenbases of gradient covariances, for stacks of matrices of one shape.

A gradient G (m x n) has the covariances ``L = E[G G^T]`` and ``R = E[G^T G]``, and is rotated to ``U^T G V`` by bases U
of L and V of R. All functions take stacks: tensors of shape ``[count, m, n]``, and ``[count, side, side]`` for side 0
(of length m) and side 1 (of length n).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Bases = Mapping[int, Tensor]
"""The bases by side; a side without one is not rotated."""


def rotate(t: Tensor, bases: Bases, out: Tensor) -> None:
    """Write ``U^T t V`` to ``out``, which may be ``t`` itself."""
    if 0 in bases and 1 in bases:
        torch.bmm(torch.bmm(bases[0].mT, t), bases[1], out=out)
    else:
        out.copy_(torch.bmm(bases[0].mT, t) if 0 in bases else torch.bmm(t, bases[1]))


def rotate_back(t: Tensor, bases: Bases, out: Tensor) -> None:
    """Write ``U t V^T`` to ``out``, which may be ``t`` itself."""
    rotate(t, {side: basis.mT for side, basis in bases.items()}, out)


def add_covariance(covariance: Tensor, gradients: Tensor, side: int, beta: float) -> None:
    """Replace L by ``beta L + (1 - beta) G G^T``, or R by the same of ``G^T G``, in place."""
    g = gradients if side == 0 else gradients.mT
    covariance.baddbmm_(g, g.mT, beta=beta, alpha=1.0 - beta)


def is_refreshed(t: int, every: int) -> bool:
    """Return whether step ``t`` takes new bases: one in ``every`` does, and more of the first ``10 every``.

    Gradients change fastest at the beginning, so the steps between new bases are a tenth of those before.
    """
    return t % max(1, min(every, t // 10)) == 0


def first_basis(covariance: Tensor) -> Tensor:
    """Return the eigenvectors as columns, those of the largest eigenvalues first.

    LAPACK fails on some matrices of low rank in float32, or returns NaN, so these are taken in float64. If that fails
    too, the basis begins as the identity.
    """
    for precision in (covariance.dtype, torch.float64):
        try:
            vectors: Tensor = torch.linalg.eigh(covariance.to(precision)).eigenvectors
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(torch.isfinite(vectors).all()):
            return vectors.to(covariance.dtype).flip(-1)
    return torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device).expand_as(covariance)


def next_basis(covariance: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step of power iteration, ``QR(C U)``, with columns in the order of ``diag(U^T C U)``.

    Returns:
        the new basis, and the order ``[count, side]`` in which the old columns were taken.
    """
    image = torch.bmm(covariance, basis)
    order = (basis * image).sum(1).argsort(dim=1, descending=True, stable=True)
    image = image.gather(2, order.unsqueeze(1).expand_as(image))
    return torch.linalg.qr(image).Q, order


def permuted(t: Tensor, order: Tensor, side: int) -> Tensor:
    """Return a stack of rotated tensors with rows (side 0) or columns (side 1) in another order."""
    index = order.unsqueeze(2) if side == 0 else order.unsqueeze(1)
    return t.gather(1 + side, index.expand_as(t))


def changed(t: Tensor, old: Tensor, new: Tensor, side: int) -> Tensor:
    """Return a stack of tensors rotated by ``old`` on one side as rotated by ``new``."""
    between = torch.bmm(new.mT, old)
    return torch.bmm(between, t) if side == 0 else torch.bmm(t, between.mT)
