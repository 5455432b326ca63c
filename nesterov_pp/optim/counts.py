"""Step counts and products of mu, each parameter's in a tensor of its own as in torch.optim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nesterov_pp.kernels.raw import has_memory, in_fake_mode

COUNTS = ("step", "mu_product")


def default_dtype() -> torch.dtype:
    """Return the dtype of step counts, as torch.optim chooses it."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


@torch.no_grad()
def side_by_side(numbers: Sequence[Tensor]) -> list[Tensor]:
    """Return the numbers, those of one dtype in one piece of memory, which a step over many parameters reads faster."""
    result = list(numbers)
    if in_fake_mode():
        return result  # fake mode only knows the values of numbers that were never moved
    for kind in {(t.dtype, t.device) for t in numbers}:
        chosen = [i for i, t in enumerate(numbers) if (t.dtype, t.device) == kind and t.numel() == 1 and has_memory(t)]
        together = torch.stack([numbers[i].detach().reshape(()) for i in chosen]) if chosen else torch.empty(0)
        for i, view in zip(chosen, together.unbind(), strict=True):
            result[i] = view.view_as(numbers[i])
    return result


def together(numbers: Sequence[Tensor]) -> Tensor | None:
    """Return numbers that lie ``side_by_side`` in this order as one tensor sharing their memory, or else None."""
    first = numbers[0]
    alike = all(
        t.dtype == first.dtype
        and t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and t.storage_offset() == first.storage_offset() + i
        for i, t in enumerate(numbers)
    )
    return first.detach().as_strided((len(numbers),), (1,), first.storage_offset()) if alike else None


def lay_side_by_side(state: Mapping[Any, dict[str, Any]]) -> None:
    """Lay all counts ``side_by_side``."""
    for name in COUNTS:
        entries = [entry for entry in state.values() if isinstance(entry.get(name), Tensor)]
        for entry, number in zip(entries, side_by_side([entry[name] for entry in entries]), strict=True):
            entry[name] = number


def to_devices(state: Mapping[Any, dict[str, Any]]) -> None:
    """Move every parameter's counts to its device, in the dtype that torch.optim gives them there."""
    for p, entry in state.items():
        for name in COUNTS:
            if isinstance(entry.get(name), Tensor):
                entry[name] = entry[name].to(p.device, default_dtype())


def to_host(state: Mapping[Any, dict[str, Any]]) -> None:
    """Move counts made on the parameters' device, or loaded there, to the host, where a step reads them at once."""
    for entry in state.values():
        for name in COUNTS:
            value = entry.get(name)
            if isinstance(value, Tensor) and value.device.type not in ("cpu", "meta"):
                entry[name] = value.cpu()


def to_tensors(state: Mapping[Any, dict[str, Any]]) -> None:
    """Turn counts that are plain numbers, as in old checkpoints, into tensors."""
    for entry in state.values():
        for name in COUNTS:
            if isinstance(entry, dict) and isinstance(entry.get(name), int | float):
                entry[name] = torch.tensor(float(entry[name]), dtype=default_dtype(), device="cpu")
