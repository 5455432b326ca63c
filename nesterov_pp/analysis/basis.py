"""What the basis of a preconditioner changes about late gradients: theory, and a quadratic on which to see it.

Along an eigenvector of the Hessian, a preconditioned rule is the plain one with another curvature, so the edges of
``max_stable_step`` hold: the largest stable learning rate is the edge over ``preconditioned_curvature``. With the
gradients' covariance C proportional to the Hessian H (of curvatures h), a second moment in the eigenbasis makes this
curvature ``max(sqrt(h))``. In a basis that mixes all eigenvectors, every second moment is the mean of h, and it is
``max(h) / sqrt(mean(h))``: larger by ``sqrt(max(h) / mean(h))``, the factor by which the same delay is felt earlier.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

Matrix = NDArray[np.float64]


def preconditioned_curvature(hessian: Matrix, gradients: Matrix, basis: Matrix | None = None) -> float:
    """Return the largest eigenvalue of ``D^(-1/2) B^T H B D^(-1/2)`` with ``D = sqrt(diag(B^T C B))``.

    Args:
        hessian: H, ``(n, n)``.
        gradients: C, the gradients' covariance ``E[g g^T]``, ``(n, n)``.
        basis: B, with orthonormal columns (default: the identity, the basis of NAdam and Adam).
    """
    b = np.eye(len(hessian)) if basis is None else basis
    scale = np.diag(b.T @ gradients @ b) ** -0.25
    return float(np.linalg.eigvalsh(scale[:, None] * (b.T @ hessian @ b) * scale).max())


def late_on_a_quadratic(
    rule: Callable[[list[nn.Parameter]], Optimizer],
    *,
    delay: int,
    turned: bool,
    side: int = 16,
    spread: float = 1e3,
    noise: float = 0.1,
    updates: int = 1000,
    seed: int = 0,
) -> float:
    """Train a matrix on a noisy quadratic with gradients ``delay`` updates late; return the final loss over the first.

    The loss is ``1/2 sum(h_i h_j X_ij^2)`` with ``X = U^T W V``, so the Hessian is a Kronecker product like those of
    linear layers. Its curvatures ``h_i h_j`` reach from ``1 / spread`` to 1, and the noise has a covariance
    proportional to it. If ``turned``, U and V are random rotations; otherwise, they are the identity, and the
    coordinates of W are the eigenbasis. The learning rate falls like a cosine to a hundredth.
    """
    weight, (u, v), h = _start(side, spread, turned)
    curvature = torch.outer(h, h)
    random = torch.Generator().manual_seed(seed)
    optimizer = rule([weight])
    rates = [group["lr"] for group in optimizer.param_groups]
    first, ring = _loss(weight, u, v, curvature), [weight.detach().clone() for _ in range(delay + 1)]
    for t in range(updates):
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * max(0.01, 0.5 * (1.0 + math.cos(math.pi * t / updates)))
        z = torch.randn(side, side, generator=random, dtype=torch.float64)
        gradient = curvature * (u.T @ ring[t % (delay + 1)] @ v) + noise * curvature.sqrt() * z
        weight.grad = u @ gradient @ v.T
        optimizer.step()
        ring[t % (delay + 1)] = weight.detach().clone()
    return _loss(weight, u, v, curvature) / first


def _start(side: int, spread: float, turned: bool) -> tuple[nn.Parameter, tuple[Tensor, Tensor], Tensor]:
    random = torch.Generator().manual_seed(7)
    x, *sides = (torch.randn(side, side, generator=random, dtype=torch.float64) for _ in range(3))
    u, v = (torch.linalg.qr(t).Q if turned else torch.eye(side, dtype=torch.float64) for t in sides)
    h = torch.logspace(0.0, -0.5 * math.log10(spread), side, dtype=torch.float64)
    return nn.Parameter(u @ x @ v.T), (u, v), h


def _loss(weight: Tensor, u: Tensor, v: Tensor, curvature: Tensor) -> float:
    return float(0.5 * (curvature * (u.T @ weight.detach() @ v) ** 2).sum())
