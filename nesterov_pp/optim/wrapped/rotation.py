"""Adam in an estimated eigenbasis, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from nesterov_pp.optim.options import check_hyperparameters

SOURCES = ("2nd", "1st")
GEOMETRIES = ("bi", "uni")


class BasisRotation(Optimizer):
    """Basis rotation (arXiv 2602.03515, Algorithms 1 and 2, as in its released code). For a matrix W (m x n)::

        M = beta1 M + (1 - beta1) G        L = beta2 L + (1 - beta2) G G^T        R = beta2 R + (1 - beta2) G^T G
        at the first step and every refresh_every steps, new U and V (below)
        V2 = beta2 V2 + (1 - beta2) (U^T G V)^2
        W = (1 - lr wd) W - lr sqrt(1 - beta2^t) / (1 - beta1^t) U ( U^T M V / (sqrt(V2) + eps) ) V^T

    With ``source`` "2nd", U holds the eigenvectors of L and V those of R: at first from ``eigh``, then from one step of
    power iteration, ``QR(L U)``, with the columns sorted by ``diag(U^T L U)`` and V2 permuted accordingly. With "1st",
    U and V hold the singular vectors of M: at first from ``svd``, then from ``QR(M V)`` and ``QR(M^T U)``; L and R are
    not used. ``geometry`` "bi" rotates both sides; "uni" rotates the smaller side alone, and the other factor is the
    identity. "2nd" with "bi" is the paper's fastest variant; "1st" with "uni" takes the least memory.

    Tensors that are not matrices are stepped as by AdamW. Sides longer than ``largest_side`` are not rotated (an
    addition to the paper, for embeddings).

    Args:
        params: parameters or parameter groups.
        lr: learning rate (default: 1e-3).
        betas: decay rates of the moments (default: (0.9, 0.999)).
        eps: term added to the denominator (default: 1e-8).
        weight_decay: rate of the decoupled weight decay (default: 1e-2).
        source, geometry: see above (default: "2nd", "bi").
        refresh_every: steps between new bases (default: 10).
        largest_side: longest side that is rotated (default: 2048).

    Raises:
        ValueError: a hyper-parameter is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        source: str = "2nd",
        geometry: str = "bi",
        refresh_every: int = 10,
        largest_side: int = 2048,
    ) -> None:
        check_hyperparameters(lr=lr, eps=eps, betas=betas, weight_decay=weight_decay)
        if source not in SOURCES or geometry not in GEOMETRIES:
            raise ValueError(
                f"source must be one of {', '.join(SOURCES)} and geometry one of {', '.join(GEOMETRIES)}, "
                f"not {source!r} and {geometry!r}"
            )
        if refresh_every < 1 or largest_side < 1:
            raise ValueError(
                f"refresh_every and largest_side must be at least 1, not {refresh_every} and {largest_side}"
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "source": source,
            "geometry": geometry,
            "refresh_every": refresh_every,
            "largest_side": largest_side,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Perform one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, p.grad, self.state[p], group)
        return loss

    def _step_one(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        if not state:
            state["step"] = torch.zeros((), device="cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        t = int(state["step"])
        m = state["exp_avg"].lerp_(grad, 1.0 - beta1)
        sides = _sides(p, group)
        if sides:
            _refresh(state, grad, sides, group, first=t == 1)
        rotated = _rotate(grad, state)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(rotated, rotated, value=1.0 - beta2)  # as in torch: inf stays inf
        direction = _rotate(m, state) / (v.sqrt() + group["eps"])
        size = group["lr"] * (1.0 - beta2**t) ** 0.5 / (1.0 - beta1**t)
        p.mul_(1.0 - group["lr"] * group["weight_decay"])
        p.sub_(_rotate_back(direction, state), alpha=size)


def _sides(p: Tensor, group: dict[str, Any]) -> list[int]:
    """Return the dimensions that are rotated: 0 by U, 1 by V."""
    if p.dim() != 2:
        return []
    sides = [0, 1] if group["geometry"] == "bi" else [0 if p.shape[0] < p.shape[1] else 1]
    return [side for side in sides if 1 < p.shape[side] <= group["largest_side"]]


def _refresh(state: dict[str, Any], grad: Tensor, sides: list[int], group: dict[str, Any], *, first: bool) -> None:
    due = first or int(state["step"]) % group["refresh_every"] == 0
    if group["source"] == "2nd":
        for side in sides:
            g = grad if side == 0 else grad.T
            state.setdefault(f"covariance_{side}", torch.zeros_like(g @ g.T)).lerp_(g @ g.T, 1.0 - group["betas"][1])
            if due:
                _new_basis(state, side, state[f"covariance_{side}"], first=first)
    elif due and first:
        u, _, vt = torch.linalg.svd(state["exp_avg"], full_matrices=True)
        state.update({f"basis_{side}": (u, vt.T)[side].contiguous() for side in sides})
    elif due:
        # Both new bases are computed from the old ones.
        before = [state.get("basis_0"), state.get("basis_1")]
        m = state["exp_avg"]
        for side in sides:
            across, other = (m, before[1]) if side == 0 else (m.T, before[0])
            image = across if other is None else across @ other
            order = torch.argsort(image.square().sum(0), descending=True)
            # The columns of the image belong to the other side's basis, whose moments are sorted with them. (The
            # released code also sorts them if that side is not rotated, which mixes up its columns.)
            if other is not None:
                state["exp_avg_sq"] = state["exp_avg_sq"].index_select(1 - side, order)
            state[f"basis_{side}"] = torch.linalg.qr(image[:, order], mode="complete").Q


def _new_basis(state: dict[str, Any], side: int, covariance: Tensor, *, first: bool) -> None:
    if first:
        state[f"basis_{side}"] = torch.linalg.eigh(covariance).eigenvectors.flip(1)
        return
    basis = state[f"basis_{side}"]
    order = torch.argsort((basis.T @ covariance @ basis).diagonal(), descending=True)
    state["exp_avg_sq"] = state["exp_avg_sq"].index_select(side, order)
    state[f"basis_{side}"] = torch.linalg.qr(covariance @ basis[:, order]).Q


def _rotate(t: Tensor, state: dict[str, Any]) -> Tensor:
    u, v = state.get("basis_0"), state.get("basis_1")
    t = t if u is None else u.T @ t
    return t if v is None else t @ v


def _rotate_back(t: Tensor, state: dict[str, Any]) -> Tensor:
    u, v = state.get("basis_0"), state.get("basis_1")
    t = t if u is None else u @ t
    return t if v is None else t @ v.T
