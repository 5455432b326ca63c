"""Steps that autograd records: torch's own functions, with gradients through every operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.nadam import nadam

Groups = list[dict[str, Any]]
States = dict[Any, dict[str, Any]]


def step_nadam(groups: Groups, state: States) -> None:
    """Take one step of ``torch.optim.NAdam(differentiable=True)`` for the parameters that have gradients."""
    for group in groups:
        params, grads, has_complex = _with_gradients(group)
        beta1, beta2 = group["betas"]
        nadam(
            params,
            grads,
            _of(params, state, "exp_avg"),
            _of(params, state, "exp_avg_sq"),
            _of(params, state, "mu_product"),
            _of(params, state, "step"),
            decoupled_weight_decay=group["decoupled_weight_decay"],
            foreach=False,
            capturable=group["capturable"],
            differentiable=True,
            has_complex=has_complex,
            maximize=group["maximize"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum_decay=group["momentum_decay"],
            eps=group["eps"],
        )


def step_adamw(groups: Groups, state: States) -> None:
    """Take one step of ``torch.optim.AdamW(differentiable=True)`` for the parameters that have gradients."""
    for group in groups:
        params, grads, has_complex = _with_gradients(group)
        largest = _of(params, state, "max_exp_avg_sq") if group["amsgrad"] else []
        beta1, beta2 = group["betas"]
        adamw(
            params,
            grads,
            _of(params, state, "exp_avg"),
            _of(params, state, "exp_avg_sq"),
            largest,
            _of(params, state, "step"),
            foreach=False,
            capturable=group["capturable"],
            differentiable=True,
            fused=False,
            has_complex=has_complex,
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


def _with_gradients(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], bool]:
    params = [p for p in group["params"] if p.grad is not None]
    return params, [p.grad for p in params], any(map(torch.is_complex, params))


def _of(params: list[Tensor], state: States, name: str) -> list[Tensor]:
    return [state[p][name] for p in params]
