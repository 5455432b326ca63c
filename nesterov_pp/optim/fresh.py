"""State that follows its parameters: created for new ones, laid out like them, with masters that take over writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from nesterov_pp.kernels import zeros_like
from nesterov_pp.kernels.raw import has_memory, is_subclass
from nesterov_pp.optim import counts
from nesterov_pp.optim.coded import CODES, RESIDUAL, SCALE_OF, encode_entries, fresh_scales, is_coded
from nesterov_pp.optim.options import Options


@torch.inference_mode(False)  # otherwise only inference mode could write the state
def fresh_state(
    parameters: Sequence[Tensor], names: Sequence[str], options: Sequence[Options], *, on_device: bool
) -> list[dict[str, Tensor]]:
    """Return the entries ``names`` of every parameter's state before the first step, with counts on device or host.

    Parameters whose ``options`` ask for it have codes, their scales, and residuals.
    """
    entries = _fresh_entries(parameters, names, options, on_device=on_device)
    states = [{name: values[i] for name, values in entries.items()} for i in range(len(parameters))]
    for p, state, of in zip(parameters, states, options, strict=True):
        if is_coded(state):
            state.update({scale: fresh_scales(p) for name, scale in SCALE_OF.items() if name in state})
        if of.has_residual(p):
            state[RESIDUAL] = fresh_residual(p)
    return states


def fresh_residual(p: Tensor) -> Tensor:
    """Return the residual of a parameter whose value is exact."""
    return torch.zeros_like(p, dtype=torch.int8, memory_format=torch.preserve_format, requires_grad=False)


def _fresh_entries(
    parameters: Sequence[Tensor], names: Sequence[str], options: Sequence[Options], *, on_device: bool
) -> dict[str, list[Tensor]]:
    scalar = counts.default_dtype()
    devices = [p.device if on_device else torch.device("cpu") for p in parameters]
    entries: dict[str, list[Tensor]] = {}
    for name in names:
        if name == "step":
            entries[name] = counts.side_by_side([torch.tensor(0.0, dtype=scalar, device=d) for d in devices])
        elif name == "mu_product":
            real = [p.dtype.to_real() if p.is_complex() else p.dtype for p in parameters]
            dtypes = [scalar if on_device else torch.promote_types(scalar, dtype) for dtype in real]
            ones = [torch.tensor(1.0, dtype=t, device=d) for t, d in zip(dtypes, devices, strict=True)]
            entries[name] = counts.side_by_side(ones)
        else:
            dtypes = [of.moment_dtype(p) for p, of in zip(parameters, options, strict=True)]
            codes = CODES.get(name, torch.int8)
            entries[name] = zeros_like(parameters, [codes if dtype == torch.int8 else dtype for dtype in dtypes])
    return entries


@torch.no_grad()
@torch.inference_mode(False)
def fresh_masters(parameters: Sequence[Tensor], options: Options) -> list[Tensor | None]:
    """Return the masters of parameters before their first step; None also for those that have no values yet."""
    ready = [not p.is_meta and has_memory(p) for p in parameters]
    found = iter(masters_of([{}] * sum(ready), [p for p, has in zip(parameters, ready, strict=True) if has], options))
    return [next(found) if has else None for has in ready]


def masters_of(
    states: Sequence[Mapping[str, Any]], parameters: Sequence[Tensor], options: Options
) -> list[Tensor | None]:
    """Return the master of every parameter that has one: that of its state, or else a copy; None for the others.

    Raises:
        ValueError: a parameter without a master in its state has no values to copy.
    """
    return [_master(s, p) if options.has_master(p) else None for s, p in zip(states, parameters, strict=True)]


def _master(state: Mapping[str, Any], p: Tensor) -> Tensor:
    found: Tensor | None = state.get("master_weight")
    if found is None and not has_memory(p):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} has a storage smaller than its shape (resized, or freed)"
        )
    return p.detach().to(torch.float32, memory_format=torch.preserve_format) if found is None else found


def follow_parameters(
    parameters: Sequence[Tensor],
    state: Mapping[Any, dict[str, Any]],
    names: Sequence[str],
    options: Sequence[Options],
    *,
    on_device: bool,
) -> bool:
    """Recreate state that was never stepped if its parameter's dtype, shape or device has changed since.

    This happens under ``model.double()`` or ``to_empty()``. Returns whether there was any such state.
    """
    outgrown = [
        (p, of)
        for p, of in zip(parameters, options, strict=True)
        if state.get(p) and not is_lazy(p) and _has_outgrown(p, state[p], of)
    ]
    chosen, their = [p for p, _ in outgrown], [of for _, of in outgrown]
    for p, entries in zip(chosen, fresh_state(chosen, names, their, on_device=on_device), strict=True):
        for name in ("master_weight", "max_exp_avg_sq", RESIDUAL, *SCALE_OF.values()):
            state[p].pop(name, None)
        state[p].update(entries)
    return bool(outgrown)


def _has_outgrown(p: Tensor, entries: Mapping[str, Any], options: Options) -> bool:
    first = entries.get("exp_avg")
    if not isinstance(first, Tensor):
        return False
    fits = first.shape == p.shape and first.device == p.device and first.is_complex() == p.is_complex()
    if fits and first.dtype == options.moment_dtype(p):
        return False
    return _is_untouched(entries)


def _is_untouched(entries: Mapping[str, Any]) -> bool:
    """Return whether a parameter's state is the state from before its first step."""
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    if not all(map(has_memory, tensors.values())):
        return False
    counted = tensors.pop("step", None)
    if counted is None or (counted.device.type != "meta" and float(counted) != 0.0):
        return False
    tensors.pop("mu_product", None)
    tensors.pop("master_weight", None)
    return not any(bool(value.any()) for value in tensors.values() if value.device.type != "meta")


def follow_layouts(parameters: Sequence[Tensor], state: Mapping[Any, dict[str, Any]]) -> bool:
    """Lay state out like its parameters, which ``model.to(memory_format=...)`` moves. Return whether any changed."""
    changed = False
    for p in parameters:
        for name, value in state.get(p, {}).items():
            plain = isinstance(value, Tensor) and has_memory(value) and (not is_subclass(value) or is_subclass(p))
            strided = plain and value.layout == p.layout == torch.strided
            if name in SCALE_OF and is_coded(state[p]):
                continue  # codes are in groups along the memory; `encode_entries` makes new ones
            if strided and value.shape == p.shape and value.stride() != p.stride():
                moved = torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)
                changed |= moved.stride() != value.stride()
                state[p][name] = moved
        if is_coded(state.get(p, {})):
            before = state[p]["exp_avg"]
            encode_entries(state[p], p)
            changed |= state[p]["exp_avg"] is not before
    return changed


class MasterWeights:
    """Master weights, kept consistent with the parameters they belong to.

    A step writes both. If something else, such as ``model.load_state_dict``, has written a parameter since, its master
    takes over the elements that differ from the master's rounded value. The other elements keep the bits that rounding
    would lose, so the order in which a checkpoint's model and optimizer are loaded does not matter. Writes through
    ``.data`` go unnoticed until the optimizer loads a state.
    """

    def __init__(self, slots: list[list[Tensor]], masters: list[Tensor | None]) -> None:
        """Pair ``slots[s][i]``, parameter ``i`` in ring slot ``s``, with ``masters[i]``, its master or None."""
        self._pairs = [
            [(p, master) for p, master in zip(slot, masters, strict=True) if master is not None] for slot in slots
        ]
        self._versions: list[int] = []

    @torch.no_grad()
    def follow(self, slot: int) -> None:
        """Take over what was written to the parameters of a slot since the last step."""
        if not self._pairs or not self._pairs[0] or self._versions == self._now(slot):
            return
        for p, master in self._pairs[slot]:
            master.copy_(torch.where(master.to(p.dtype) == p, master, p.to(master.dtype)))

    def written(self, slot: int) -> None:
        """Note that the parameters of a slot have just been written from their masters."""
        if self._pairs and self._pairs[0]:
            self._versions = self._now(slot)

    def _now(self, slot: int) -> list[int]:
        return [p._version for p, _ in self._pairs[slot]]
