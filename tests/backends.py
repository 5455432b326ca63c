"""The backends that can step the CPU tensors of a test: Triton's is one where its interpreter is on."""

from __future__ import annotations

import os

import torch

import nesterov_pp as npp

_CANDIDATES = ["cpu", "reference"]
if os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available():
    _CANDIDATES.append("triton")

BACKENDS = [name for name in _CANDIDATES if npp.kernels.available_backends()[name] is None]
