"""Today's gradient guessed from the last few late ones: the paper's forecasting baselines."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nesterov_pp.methods.pipedream import PIPEDREAM_LR
from nesterov_pp.pipeline.recipe import register

HISTORY = 5
Weights = Callable[[int, int], list[float]]
"""``(gradients kept, delay) -> weights`` of the gradients, oldest first."""


def polynomial_weights(history: int, delay: int, order: int = 2) -> list[float]:
    """Weights of the least-squares polynomial through ``history`` equally spaced points, read ``delay`` steps after the
    last: ``e(delay)^T (X^T X)^-1 X^T`` with rows ``x^0 ... x^order``, x = 1 - history ... 0.

    The order is lowered where there are too few points.
    """
    order = min(order, history - 1)
    x = torch.arange(1 - history, 1, dtype=torch.float64, device="cpu")
    powers = torch.stack([x**k for k in range(order + 1)], 1)
    at = torch.tensor([float(delay) ** k for k in range(order + 1)], dtype=torch.float64, device="cpu")
    weights: list[float] = (at @ torch.linalg.pinv(powers)).tolist()
    return weights


def fourier_weights(history: int, delay: int) -> list[float]:
    """Weights of the history's discrete Fourier series, its phases advanced by ``delay`` steps beyond the last point.

    Frequencies are multiples of 1 / history, so this is the history's periodic continuation: all weight lies on the
    gradient of ``history - (delay mod history)`` steps before, or on the last one.
    """
    n = torch.arange(history, dtype=torch.float64, device="cpu")
    frequencies = torch.fft.fftfreq(history, dtype=torch.float64, device="cpu")
    weights: list[float] = (
        torch.cos(2.0 * torch.pi * torch.outer(history - 1 + delay - n, frequencies)).mean(1).tolist()
    )
    return weights


class LinearForecast:
    """``g <- sum_j c_j g_{t-j}`` over the last ``history`` gradients, the coefficients those of ``weights``.

    Keeps ``history`` tensors a parameter. Before the history is full, and where nothing is late, g stays as it is.
    """

    def __init__(self, weights: Weights, history: int = HISTORY) -> None:
        self._weights = weights
        self._kept: deque[list[Tensor]] = deque(maxlen=history)

    @torch.no_grad()
    def apply(self, parameters: Sequence[Tensor], delay: int) -> None:
        """Change the parameters' gradients in place; None counts as zeros."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self._kept.append([grad.clone() for grad in grads])
        if delay == 0 or len(self._kept) < (self._kept.maxlen or 0):
            return
        weights = self._weights(len(self._kept), delay)
        for i, p in enumerate(parameters):
            guess = torch.zeros_like(p)
            for weight, kept in zip(weights, self._kept, strict=True):
                guess.add_(kept[i], alpha=weight)
            p.grad = guess

    def state_dict(self) -> dict[str, Any]:
        """The gradients kept, oldest first."""
        return {"kept": [list(grads) for grads in self._kept]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self._kept.clear()
        self._kept.extend([grad.clone() for grad in grads] for grads in state["kept"])


POLY_FORECAST = register(
    replace(
        PIPEDREAM_LR,
        name="poly-forecast",
        summary="pipedream-lr, each gradient extrapolated over the delay by a parabola through the last 5",
        reference="arXiv 2505.01099, section 5 (recalled; not in its released code)",
        forecast=lambda: LinearForecast(polynomial_weights),
        distributed=False,
    )
)

FFT_FORECAST = register(
    replace(
        POLY_FORECAST,
        name="fft-forecast",
        summary="pipedream-lr, each gradient extrapolated over the delay by the Fourier series of the last 5",
        forecast=lambda: LinearForecast(fourier_weights),
    )
)
