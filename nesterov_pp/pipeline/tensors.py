"""What stages hand each other: tensors, or tuples and lists of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first tensor is; the CPU if it has none."""
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def to_device(value: Any, device: torch.device | str) -> Any:
    """``value`` with its tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(to_device(part, device) for part in value)
    return value


def is_finite(value: Any) -> bool:
    """Whether no tensor of ``value`` has a NaN or Inf in it; on a GPU this waits for it."""
    for tensor in value if isinstance(value, tuple | list) else (value,):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        # A sum that is finite has finite terms; only one that is not needs a closer look.
        total = tensor.detach().sum(dtype=torch.float32)
        if not torch.isfinite(total) and not torch.isfinite(tensor).all():
            return False
    return True
