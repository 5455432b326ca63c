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

IN_BATCH, ON_HOST = 32, 128
"""The longest side of covariances whose eigenvectors a GPU computes for all matrices at once; and of those for which it
is slower than the host, since it takes longer ones one after the other.

A matrix of side 32 takes 0.001 ms on an H200 and 0.09 ms on its host of 16 cores; of side 64, 0.86 and 0.22 ms; of side
256, 5.2 and 3.4 ms on this machine, but 2.4 and 2.9 ms on an H100 with another host.
"""


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
    if covariance.is_cuda and IN_BATCH < covariance.shape[-1] <= ON_HOST:
        return first_basis(covariance.cpu()).to(covariance.device)
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
    return orthonormal(image), order


def orthonormal(t: Tensor) -> Tensor:
    """Return Q of the QR decompositions of square matrices; the signs of its columns are any.

    A GPU decomposes matrices one after the other, so there Q is taken from all of them at once by Cholesky, and by
    ``qr`` only from those for which that fails.
    """
    if not t.is_cuda or t.dtype == torch.float64:
        exact: Tensor = torch.linalg.qr(t).Q
        return exact
    q, failed = cholesky_q(t)
    if bool(failed.any()):
        q[failed] = torch.linalg.qr(t[failed]).Q
    return q


def cholesky_q(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q of the QR decompositions by Cholesky QR, and for which matrices that failed.

    ``T^T T = R^T R`` and ``Q = T R^-1``, three times, in float64 and from columns of length 1. The first product is
    shifted from the singular, which leaves a Q of a moderate condition number even if that of T is 1e10; the second
    time makes it nearly, the third one fully orthonormal (Fukaya et al. 2020, doi:10.1137/18M1218212).
    """
    side = t.shape[-1]
    q = torch.nn.functional.normalize(t.double(), dim=1)
    failed = torch.zeros(len(t), dtype=torch.bool, device=t.device)
    for shift in (100 * side * torch.finfo(q.dtype).eps, 0.0, 0.0):
        product = torch.bmm(q.mT, q)
        product.diagonal(dim1=1, dim2=2).add_(shift)
        r, info = torch.linalg.cholesky_ex(product, upper=True)
        q = torch.linalg.solve_triangular(r, q, upper=True, left=False)
        failed |= info != 0
    return q.to(t.dtype), failed | ~torch.isfinite(q).all(2).all(1)


def permuted(t: Tensor, order: Tensor, side: int) -> Tensor:
    """Return a stack of rotated tensors with rows (side 0) or columns (side 1) in another order."""
    index = order.unsqueeze(2) if side == 0 else order.unsqueeze(1)
    return t.gather(1 + side, index.expand_as(t))


def changed(t: Tensor, old: Tensor, new: Tensor, side: int) -> Tensor:
    """Return a stack of tensors rotated by ``old`` on one side as rotated by ``new``."""
    between = torch.bmm(new.mT, old)
    return torch.bmm(between, t) if side == 0 else torch.bmm(t, between.mT)
