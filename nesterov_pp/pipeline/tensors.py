"""The values that stages exchange: tensors, or tuples and lists of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer; the CPU if it has none."""
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def to_device(value: Any, device: torch.device | str) -> Any:
    """Return ``value`` with its tensors moved to ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(to_device(part, device) for part in value)
    return value


def is_finite(value: Any) -> bool:
    """Return whether no tensor of ``value`` contains a NaN or Inf. On a GPU this waits for the device."""
    for tensor in value if isinstance(value, tuple | list) else (value,):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        # A finite sum has finite terms; only a sum that is not finite needs a closer look.
        total = tensor.detach().sum(dtype=torch.float32)
        if not torch.isfinite(total) and not torch.isfinite(tensor).all():
            return False
    return True
