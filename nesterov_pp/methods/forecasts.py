"""Estimates of the current gradient from the last few late ones: the paper's forecasting baselines."""

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
"""``(gradients kept, delay) -> weights``, one for each gradient, oldest first."""


def polynomial_weights(history: int, delay: int, order: int = 2) -> list[float]:
    """Return the weights that evaluate a least-squares polynomial ``delay`` steps after its last point.

    The polynomial is fitted to ``history`` equally spaced points, so the weights are ``e(delay)^T (X^T X)^-1 X^T`` with
    rows ``x^0 ... x^order``, x = 1 - history ... 0. The order is lowered if there are too few points.
    """
    order = min(order, history - 1)
    x = torch.arange(1 - history, 1, dtype=torch.float64, device="cpu")
    powers = torch.stack([x**k for k in range(order + 1)], 1)
    at = torch.tensor([float(delay) ** k for k in range(order + 1)], dtype=torch.float64, device="cpu")
    weights: list[float] = (at @ torch.linalg.pinv(powers)).tolist()
    return weights


def fourier_weights(history: int, delay: int) -> list[float]:
    """Return the weights of the history's discrete Fourier series, advanced ``delay`` steps beyond the last point.

    Frequencies are multiples of 1 / history, so this is the history's periodic continuation: all weight lies on the
    gradient ``history - (delay mod history)`` steps before the last one, or on the last one itself.
    """
    n = torch.arange(history, dtype=torch.float64, device="cpu")
    frequencies = torch.fft.fftfreq(history, dtype=torch.float64, device="cpu")
    weights: list[float] = (
        torch.cos(2.0 * torch.pi * torch.outer(history - 1 + delay - n, frequencies)).mean(1).tolist()
    )
    return weights


class LinearForecast:
    """The forecast ``g <- sum_j c_j g_{t-j}`` over the last ``history`` gradients, with coefficients from ``weights``.

    Keeps ``history`` tensors per parameter. Until the history is full, and where nothing is late, g is unchanged.
    """

    def __init__(self, weights: Weights, history: int = HISTORY) -> None:
        self._weights = weights
        self._kept: deque[list[Tensor]] = deque(maxlen=history)

    @torch.no_grad()
    def apply(self, parameters: Sequence[Tensor], delay: int) -> None:
        """Replace the parameters' gradients by their forecast; None counts as zeros."""
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
        """Return the gradients kept, oldest first."""
        return {"kept": [list(grads) for grads in self._kept]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned."""
        self._kept.clear()
        self._kept.extend([grad.clone() for grad in grads] for grads in state["kept"])


POLY_FORECAST = register(
    replace(
        PIPEDREAM_LR,
        name="poly-forecast",
        summary="pipedream-lr with each gradient extrapolated over the delay by a parabola through the last 5",
        reference="arXiv 2505.01099, section 5 (recalled; not in its released code)",
        forecast=lambda: LinearForecast(polynomial_weights),
        distributed=False,
    )
)

FFT_FORECAST = register(
    replace(
        POLY_FORECAST,
        name="fft-forecast",
        summary="pipedream-lr with each gradient extrapolated over the delay by the Fourier series of the last 5",
        forecast=lambda: LinearForecast(fourier_weights),
    )
)
