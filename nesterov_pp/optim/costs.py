"""What a step keeps and moves, counted: bytes per parameter in float32."""

from __future__ import annotations

from typing import NamedTuple

from nesterov_pp.optim.corrections import DelayCompensation, Discrepancy, GapAware, Prediction

_BYTES = 4


class Cost(NamedTuple):
    """Bytes per parameter: ``state`` beside the weights of the ring and the gradient, ``traffic`` of one step."""

    state: int
    traffic: int


def one_pass(
    *,
    adaptive: bool,
    correction: DelayCompensation | GapAware | None = None,
    prediction: Prediction | Discrepancy | None = None,
) -> Cost:
    """Of the one-pass step: every tensor that it reads or writes, once.

    Plain: weights, gradient and moments read, weights and moments written, which is 28 with two moments and 20 with
    one. A correction reads the weights of the gradient; a running mean is read and written; a prediction is written.
    """
    moments = 2 if adaptive else 1
    has_mean = (correction is not None and correction.mean_name is not None) or isinstance(prediction, Discrepancy)
    state = moments + has_mean + (prediction is not None)
    traffic = 3 + 2 * moments + (correction is not None) + 2 * has_mean + (prediction is not None)
    return Cost(_BYTES * state, _BYTES * traffic)
