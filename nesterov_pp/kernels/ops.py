"""The step as torch operators, ``torch.ops.nesterov_pp.step_`` and ``step_into``, with fake versions for tracing.

``step_(weights, grads, exp_avgs, exp_avg_sqs, coefficients, row_of)`` updates ``weights`` and both moments in place;
``step_into(weights, weights_out, ...)`` writes the new weights to ``weights_out``. The lists hold CPU tensors: weights
in float32, float64, bfloat16 or float16, gradients in the dtype of their weights, moments in that dtype, float32 or
bfloat16 (float64 only with float64). ``exp_avg_sqs`` is empty for non-adaptive rules; ``coefficients`` is a float64
CPU tensor of shape [rows, 9] (the fields of ``Coefficients``) and tensor ``i`` takes row ``row_of[i]``.

``encode_differences(version, next, codes, scales, row)`` and ``decode_differences(newest, out, codes, scales, rows)``
are those of ``nesterov_pp.kernels.differences``.
"""

from __future__ import annotations

import torch

from nesterov_pp.kernels import extension


def _nothing(*_: object) -> None:
    """Return nothing, as the operators do; they change no shape."""


if extension.load()[0] is not None:
    torch.library.register_fake("nesterov_pp::step_")(_nothing)
    torch.library.register_fake("nesterov_pp::step_into")(_nothing)
    torch.library.register_fake("nesterov_pp::encode_differences")(_nothing)
    torch.library.register_fake("nesterov_pp::decode_differences")(_nothing)
