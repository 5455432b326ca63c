"""Independent float64 optimizers, written from the equations without any code of the package."""

from __future__ import annotations

import torch
from torch import Tensor


def nadam(
    w: Tensor,
    grads: list[Tensor],
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Tensor:
    beta1, beta2 = betas
    w = w.double().clone()
    m, v, product = torch.zeros_like(w), torch.zeros_like(w), 1.0
    for t, grad in enumerate(grads, start=1):
        g = -grad.double() if maximize else grad.double()
        if decoupled_weight_decay:
            w = w - lr * weight_decay * w
        else:
            g = g + weight_decay * w
        mu = beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
        product *= mu
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = mu_next * m / (1 - product * mu_next) + (1 - mu) * g / (1 - product)
        w = w - lr * m_hat / ((v / (1 - beta2**t)).sqrt() + eps)
    return w


def adamw(
    w: Tensor,
    grads: list[Tensor],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
) -> Tensor:
    beta1, beta2 = betas
    w = w.double().clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, grad in enumerate(grads, start=1):
        g = -grad.double() if maximize else grad.double()
        w = w * (1 - lr * weight_decay)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        w = w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return w
