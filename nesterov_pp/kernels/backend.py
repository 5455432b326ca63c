"""The backends of the one-pass step: what each is, where it can be used, and the choice among them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from nesterov_pp.kernels import extension, triton_package
from nesterov_pp.kernels.plan import Plan, Tensors
from nesterov_pp.kernels.raw import why_never_raw
from nesterov_pp.kernels.reference import ReferencePlan

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Reason = str | None
"""The reason why something cannot be done, as the end of a sentence; None if it can."""


@dataclass(frozen=True)
class Backend:
    """One way to run the step.

    ``device`` is the kind of device that the backend is made for, None for every kind. ``unavailable`` returns why the
    backend cannot be used here, or None. ``plan`` makes the plan of an optimizer; with a seed, bfloat16 is rounded
    stochastically. With ``on_device``, the host need not wait for the steps, which can count themselves and scale
    gradients on the device of the tensors.
    """

    name: str
    what: str
    device: str | None
    unavailable: Callable[[], Reason]
    plan: Callable[[Tensors, int | None], Plan]
    on_device: bool = False

    def device_types(self) -> tuple[str, ...]:
        """Return the types of the devices whose tensors the backend steps here."""
        if self.name == "triton" and self.unavailable() is None and not torch.cuda.is_available():
            return ("cpu",)  # under the interpreter
        return () if self.device is None else (self.device,)

    def refusal(self, tensors: Iterable[Tensor]) -> Reason:
        """Return why the backend cannot step these tensors, or None if it can."""
        if self.device is None:
            return None
        devices = set()
        for t in tensors:
            if t.layout != torch.strided or t.dtype not in _DTYPES or t.device.type not in self.device_types():
                kind = f"{str(t.layout).removeprefix('torch.')} {str(t.dtype).removeprefix('torch.')}"
                where = "on the CPU" if self.device == "cpu" else "on a GPU"
                return f"it takes strided float32, float64, bfloat16 or float16 {where}, not {kind} on {t.device}"
            odd = why_never_raw(t)
            if odd is not None:
                return f"it takes plain tensors, but one of these {odd}"
            if not _is_dense(t):
                return f"it takes dense tensors without overlap, not strides {t.stride()} for shape {tuple(t.shape)}"
            devices.add(t.device)
        if len(devices) > 1:
            return f"it steps parameters of one device, not of {' and '.join(sorted(map(str, devices)))}"
        return self.unavailable()


def _no_cuda() -> Reason:
    module, reason = extension.load()
    if module is None:
        return reason
    if not hasattr(module, "CudaPlan"):
        return "the extension was built without CUDA; building it with CUDA needs a CUDA toolkit and a torch with CUDA"
    return None if torch.cuda.is_available() else "torch finds no GPU"


def _no_triton() -> Reason:
    """Return why Triton cannot be used, or None if it can; Triton is not imported before this check."""
    reason = extension.load()[1]
    if reason is not None:
        return reason
    try:
        plans = _triton_plans()
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if torch.cuda.is_available() or plans.interpreting():
        return None
    return "torch finds no GPU (on the CPU, Triton runs only with TRITON_INTERPRET=1)"


def _compiled(kind: str) -> Callable[[Tensors, int | None], Plan]:
    def plan(tensors: Tensors, seed: int | None) -> Plan:
        module = extension.require()
        return cast(Plan, getattr(module, kind)(tensors=extension.tensors_of(module, tensors), seed=seed))

    return plan


def _triton_plan(tensors: Tensors, seed: int | None) -> Plan:
    return cast(Plan, _triton_plans().TritonPlan(tensors, seed))


def _triton_plans() -> ModuleType:
    """Return the module of the Triton plan; ImportError if Triton does not work."""
    return triton_package.imported("plan")


# For each kind of device, the fastest backend comes first.
_REGISTRY = (
    Backend(
        "cuda",
        "one launch for all tensors of a device and dtype",
        "cuda",
        _no_cuda,
        _compiled("CudaPlan"),
        on_device=True,
    ),
    Backend("triton", "the pass of the cuda backend, in Triton", "cuda", _no_triton, _triton_plan, on_device=True),
    Backend(
        "cpu",
        "C++ on the CPU: float32, float64, bfloat16, float16",
        "cpu",
        lambda: extension.load()[1],
        _compiled("CpuPlan"),
    ),
    Backend("reference", "plain torch: every device and dtype", None, lambda: None, ReferencePlan),
)
_BY_NAME = {backend.name: backend for backend in _REGISTRY}
BACKENDS = ("auto", *_BY_NAME)
DEVICE_BACKENDS = tuple(backend.name for backend in _REGISTRY if backend.on_device)


def describe_backend(name: str) -> str:
    """Return a one-line description of a backend."""
    return _BY_NAME[name].what


def available_backends() -> dict[str, Reason]:
    """Return the name of each backend with None if it can be used, or with the reason why it cannot."""
    return {backend.name: backend.unavailable() for backend in _REGISTRY}


def automatic_backend(device: str) -> str:
    """Return what "auto" chooses for plain tensors on "cpu" or "cuda": the fastest backend that can be used here."""
    return next((backend.name for backend in _made_for(device) if backend.unavailable() is None), "reference")


def _made_for(device: str) -> list[Backend]:
    return [backend for backend in _REGISTRY if backend.device == device]


def choose_backend(requested: str, tensors: list[Tensor], only_reference: str | None = None) -> str:
    """Return the backend that steps ``tensors``: ``requested``, or the fastest that can if ``requested`` is "auto".

    ``only_reference`` names an option that only the reference backend supports.

    Raises:
        ValueError: the name is unknown, or the backend cannot step these tensors.
    """
    if requested not in BACKENDS:
        raise ValueError(f"unknown backend {requested!r}; choose one of {', '.join(BACKENDS)}")
    if requested == "reference":
        return requested
    if requested == "auto":
        candidates = _made_for("cpu" if all(t.device.type == "cpu" for t in tensors) else "cuda")
    else:
        candidates = [_BY_NAME[requested]]
    for backend in candidates:
        refusal = f"it does not support {only_reference}" if only_reference else backend.refusal(tensors)
        if refusal is None and _overlap(tensors):
            refusal = "it steps all parameters at once, and some of these share memory"
        if refusal is None:
            return backend.name
        if requested != "auto":
            raise ValueError(f"backend {requested!r} cannot be used: {refusal}")
    unavailable = {backend.name: backend.unavailable() for backend in candidates}
    if all(unavailable.values()) and any(t.device.type in ("cpu", "cuda") for t in tensors):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in unavailable.items())
        warnings.warn(f"using the slower reference backend ({reasons})", RuntimeWarning, stacklevel=4)
    return "reference"


def make_plan(backend: str, tensors: Tensors, seed: int | None = None) -> Plan:
    """Make the plan of a backend that ``choose_backend`` returned; with a seed, bfloat16 is rounded stochastically."""
    return _BY_NAME[backend].plan(tensors, seed)


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t)


def _overlap(tensors: list[Tensor]) -> bool:
    """Return whether any two of the tensors share memory, as parameters that are views of one tensor do."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel() and t.data_ptr())
    return any(end > begin for (_, end), (begin, _) in pairwise(spans))
