"""Backends of the one-pass step, and the choice between them.

``cuda`` and ``triton``: one launch for all tensors of a GPU that agree in dtypes. ``cpu``: C++, one parallel region
over all tensors. ``reference``: plain torch, any device and dtype.
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
from nesterov_pp.kernels.corrections import Correction, Kind
from nesterov_pp.kernels.memory import zeros_like
from nesterov_pp.kernels.plan import Plan, StepClass, Tensors
from nesterov_pp.kernels.raw import why_never_raw
from nesterov_pp.kernels.reference import ReferencePlan

__all__ = [
    "BACKENDS",
    "Coefficients",
    "Correction",
    "Kind",
    "Plan",
    "StepClass",
    "Tensors",
    "automatic_backend",
    "available_backends",
    "choose_backend",
    "make_plan",
    "ops",
    "zeros_like",
]

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")
_CORRECTIONS = "corrections and predictions of late gradients"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def available_backends() -> dict[str, str | None]:
    """Each backend's name, with None where it can be used and else the reason why not."""
    return {name: _unavailable(name) for name in BACKENDS if name != "auto"}


def automatic_backend(device: str) -> str:
    """What "auto" takes for plain tensors on "cpu" or "cuda": the fastest backend that can be used here."""
    return next((name for name in _candidates(device) if _unavailable(name) is None), "reference")


def _candidates(device: str) -> list[str]:
    """The backends for a device, fastest first."""
    return ["cpu"] if device == "cpu" else ["cuda", "triton"]


def _unavailable(backend: str) -> str | None:
    """Why a backend cannot be used here, or None. Only a question about Triton imports Triton."""
    if backend == "cuda":
        return _no_cuda()
    if backend == "triton":
        return _no_triton()
    return extension.load()[1] if backend == "cpu" else None


def _no_cuda() -> str | None:
    module, reason = extension.load()
    if module is None:
        return reason
    if not hasattr(module, "CudaPlan"):
        return "the extension was built without CUDA: that takes a CUDA toolkit and a torch with CUDA"
    return None if torch.cuda.is_available() else "torch finds no GPU"


def _no_triton() -> str | None:
    reason = extension.load()[1]
    if reason is not None:
        return reason
    try:
        plans = extension.triton_plans()
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if torch.cuda.is_available() or plans.interpreting():
        return None
    return "torch finds no GPU (on the CPU, Triton runs under TRITON_INTERPRET=1 only)"


def _refusal(backend: str, tensors: Iterable[Tensor]) -> str | None:
    """Why a compiled backend cannot step these tensors, or None."""
    devices = set()
    for t in tensors:
        if t.layout != torch.strided or t.dtype not in _DTYPES or t.device.type not in _device_types(backend):
            kind = f"{str(t.layout).removeprefix('torch.')} {str(t.dtype).removeprefix('torch.')}"
            where = "on the CPU" if backend == "cpu" else "on a GPU"
            return f"it takes strided float32, float64, bfloat16 or float16 {where}, not {kind} on {t.device}"
        odd = why_never_raw(t)
        if odd is not None:
            return f"it takes plain tensors, and one {odd}"
        if not _is_dense(t):
            return f"it takes dense tensors without overlap, not strides {t.stride()} for shape {tuple(t.shape)}"
        devices.add(t.device)
    if len(devices) > 1:
        return f"it steps parameters of one device, not of {' and '.join(sorted(map(str, devices)))}"
    return _unavailable(backend)


def _device_types(backend: str) -> tuple[str, ...]:
    if backend == "triton" and _no_triton() is None and not torch.cuda.is_available():
        return ("cpu",)
    return ("cpu",) if backend == "cpu" else ("cuda",)


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t)


def _overlap(tensors: list[Tensor]) -> bool:
    """Whether any two of the tensors share memory, as separate parameters that are views of one tensor do."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel() and t.data_ptr())
    return any(end > begin for (_, end), (begin, _) in pairwise(spans))


def choose_backend(
    requested: str, tensors: list[Tensor], only_reference: str | None = None, *, corrects: bool = False
) -> str:
    """The backend that steps ``tensors``: ``requested``, or the fastest that can where it is "auto".

    ``only_reference`` names an option that no other backend has; ``corrects``: the pass has a correction in it.

    Raises:
        ValueError: the name is unknown, or the backend cannot step these tensors.
    """
    if requested not in BACKENDS:
        raise ValueError(f"unknown backend {requested!r}; choose one of {', '.join(BACKENDS)}")
    if requested == "reference":
        return requested
    candidates = [requested]
    if requested == "auto":
        candidates = _candidates("cpu" if all(t.device.type == "cpu" for t in tensors) else "cuda")
    refusals = {}
    for name in candidates:
        refusal = f"it does not have {only_reference}" if only_reference else _refusal(name, tensors)
        if refusal is None and corrects and any(t.dtype == torch.float16 for t in tensors):
            refusal = f"it does not have {_CORRECTIONS} in float16"
        if refusal is None and _overlap(tensors):
            refusal = "it steps all parameters at once, and some of these share memory"
        if refusal is None:
            return name
        refusals[name] = refusal
    if requested != "auto":
        raise ValueError(f"backend {requested!r} cannot be used: {refusals[requested]}")
    unavailable = [_unavailable(name) for name in candidates]
    if all(unavailable) and any(t.device.type in ("cpu", "cuda") for t in tensors):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in zip(candidates, unavailable, strict=True))
        warnings.warn(f"the slower reference backend is used ({reasons})", RuntimeWarning, stacklevel=4)
    return "reference"


def make_plan(backend: str, tensors: Tensors, seed: int | None = None) -> Plan:
    """The plan of a backend that ``choose_backend`` returned; with a seed, bfloat16 is rounded stochastically."""
    if backend == "reference":
        return ReferencePlan(tensors, seed)
    module, reason = extension.load()
    if module is None:
        raise ValueError(f"backend {backend!r} cannot be used: {reason}")
    if backend == "triton":
        return cast(Plan, extension.triton_plans().TritonPlan(tensors, seed))
    kind = module.CudaPlan if backend == "cuda" else module.Plan
    plan = kind(tensors=extension.tensors_of(module, tensors), seed=seed)
    return cast(Plan, plan)
