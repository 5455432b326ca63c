"""The one-pass step: its scalars, its tensors, and the backends that run it.

The backends ``cuda`` and ``triton`` make one launch for all tensors of a GPU that have the same dtypes. ``cpu`` runs
C++ in one parallel region over all tensors. ``reference`` uses plain torch, on any device and dtype.
"""

from __future__ import annotations

from nesterov_pp.kernels import ops
from nesterov_pp.kernels.backend import (
    BACKENDS,
    DEVICE_BACKENDS,
    automatic_backend,
    available_backends,
    choose_backend,
    describe_backend,
    make_plan,
)
from nesterov_pp.kernels.plan import Plan, StepClass, StepSlots, Tensors
from nesterov_pp.kernels.region import zeros_like
from nesterov_pp.kernels.scalars import Coefficients, Correction, CorrectionKind, Normaliser

__all__ = [
    "BACKENDS",
    "DEVICE_BACKENDS",
    "Coefficients",
    "Correction",
    "CorrectionKind",
    "Normaliser",
    "Plan",
    "StepClass",
    "StepSlots",
    "Tensors",
    "automatic_backend",
    "available_backends",
    "choose_backend",
    "describe_backend",
    "make_plan",
    "ops",
    "zeros_like",
]
