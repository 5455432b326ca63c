"""Backends of the one-pass step, and the choice between them.

``cpu``: C++, one parallel region over all tensors. ``reference``: plain torch, any device and dtype. ``cuda`` and
``triton`` are named here so that messages and ``info`` can say why they are not available.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from nesterov_pp.kernels import extension, ops
from nesterov_pp.kernels.coefficients import Coefficients
from nesterov_pp.kernels.memory import zeros_like
from nesterov_pp.kernels.plan import Plan, StepClass, Tensors
from nesterov_pp.kernels.reference import ReferencePlan

__all__ = [
    "BACKENDS",
    "Coefficients",
    "Plan",
    "StepClass",
    "Tensors",
    "available_backends",
    "choose_backend",
    "make_plan",
    "ops",
    "zeros_like",
]

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")
_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def available_backends() -> dict[str, str | None]:
    """Each backend's name, with None where it can be used and else the reason why not."""
    return {
        "cuda": "this version has no CUDA kernels",
        "triton": "this version has no Triton kernels",
        "cpu": extension.load()[1],
        "reference": None,
    }


def _cpu_refusal(tensors: Iterable[Tensor]) -> str | None:
    """Why the cpu backend cannot step these tensors, or None."""
    for t in tensors:
        if t.device.type != "cpu" or t.layout != torch.strided or t.dtype not in _CPU_DTYPES:
            kind = f"{str(t.layout).removeprefix('torch.')} {str(t.dtype).removeprefix('torch.')}"
            return f"it takes strided float32, float64, bfloat16 or float16 on the CPU, not {kind} on {t.device}"
        if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return f"it takes plain tensors, not {type(t).__name__}"
        if not _is_dense(t):
            return f"it takes dense tensors without overlap, not strides {t.stride()} for shape {tuple(t.shape)}"
    return extension.load()[1]


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t)


def _overlap(tensors: list[Tensor]) -> bool:
    """Whether any two of the tensors share memory, as separate parameters that are views of one tensor do."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel())
    return any(end > begin for (_, end), (begin, _) in pairwise(spans))


def choose_backend(requested: str, tensors: list[Tensor], only_reference: str | None = None) -> str:
    """The backend that steps ``tensors``: ``requested``, or the fastest that can where it is "auto".

    ``only_reference`` names an option that no other backend has.

    Raises:
        ValueError: the name is unknown, or the backend cannot step these tensors.
    """
    if requested not in BACKENDS:
        raise ValueError(f"unknown backend {requested!r}; choose one of {', '.join(BACKENDS)}")
    refusal = f"it does not have {only_reference}" if only_reference else _cpu_refusal(tensors)
    if refusal is None and _overlap(tensors):
        refusal = "it steps all parameters at once, and some of these share memory"
    if requested == "auto":
        on_cpu = all(t.device.type == "cpu" for t in tensors)
        unavailable = extension.load()[1]
        if on_cpu and unavailable is not None:
            warnings.warn(f"the slower reference backend is used: {unavailable}", RuntimeWarning, stacklevel=4)
        return "reference" if refusal else "cpu"
    reason = refusal if requested == "cpu" else available_backends()[requested]
    if reason is not None:
        raise ValueError(f"backend {requested!r} cannot be used: {reason}")
    return requested


def make_plan(backend: str, tensors: Tensors, seed: int | None = None) -> Plan:
    """The plan of a backend that ``choose_backend`` returned; with a seed, bfloat16 is rounded stochastically."""
    if backend == "reference":
        return ReferencePlan(tensors, seed)
    module, reason = extension.load()
    if module is None:
        raise ValueError(f"backend {backend!r} cannot be used: {reason}")
    plan = module.Plan(
        names=tensors.names,
        numbers=tensors.numbers,
        groups=tensors.groups,
        slots=tensors.slots,
        exp_avgs=tensors.exp_avgs,
        exp_avg_sqs=tensors.exp_avg_sqs,
        masters=tensors.masters,
        steps=tensors.steps,
        mu_products=tensors.mu_products,
        seed=seed,
    )
    return cast(Plan, plan)
