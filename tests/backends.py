"""The backends that the numerical tests run over, and the device for the tensors of the device backends."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import nesterov_pp as npp

ON_DEVICE = ("triton", "cuda")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""The device of the backends in ``ON_DEVICE``; without a GPU, Triton's interpreter is a backend for the CPU."""

WHY_NOT = npp.kernels.available_backends()
BACKENDS = [name for name in ("cpu", "reference", *ON_DEVICE) if WHY_NOT[name] is None]


class DrawnOnTheHost(TorchFunctionMode):
    """A mode that draws random tensors on the host and moves them to a device: equal numbers on every device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is None or "device" in kwargs:
            return func(*args, **kwargs)
        return func(*args, **kwargs, device=generator.device).to(self._device)
