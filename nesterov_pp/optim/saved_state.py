"""Checks of a loaded optimizer state, and the dtypes that are kept from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nesterov_pp.optim.coded import CODES, RESIDUAL, SCALE_OF, check_saved, encode_entries, is_coded, residual_of
from nesterov_pp.optim.counts import COUNTS
from nesterov_pp.optim.options import Options

KEPT_DTYPES = (torch.float32, torch.bfloat16)


def check_form(state_dict: object) -> None:
    """Refuse an object that is not the state of any optimizer.

    Raises:
        ValueError: ``state_dict`` is not a dict with 'state' and 'param_groups'.
    """
    what = "load_state_dict takes what state_dict() returned, a dict with 'state' and 'param_groups', not"
    if not isinstance(state_dict, dict):
        raise ValueError(f"{what} {type(state_dict).__name__}")
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"{what} {sorted(map(str, state_dict))}")


def _check_parts(saved: Mapping[str, Any]) -> None:
    groups = saved["param_groups"]
    if not isinstance(groups, list) or not all(isinstance(g, dict) and "params" in g for g in groups):
        raise ValueError("the 'param_groups' of a saved state must be a list of dicts with 'params'")
    if not isinstance(saved["state"], dict):
        raise ValueError(f"the 'state' of a saved state must be a dict, not {type(saved['state']).__name__}")


def check_fits(
    saved: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    hyperparameters: list[str],
    names: list[str],
    options: Options,
) -> None:
    """Refuse the state of another optimizer, of parameters of other shapes, or in formats that ``options`` do not take.

    Raises:
        ValueError: a hyper-parameter or an entry is missing, or an entry is malformed or of another shape or format.
    """
    _check_parts(saved)
    saved_groups = saved["param_groups"]
    if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in groups]:
        return  # torch itself refuses this
    for k, (saved_group, group) in enumerate(zip(saved_groups, groups, strict=True)):
        for key in hyperparameters:
            if key not in saved_group:
                raise ValueError(f"the saved parameter group {k} has no {key!r}; it was saved by another optimizer")
        for i, (key, p) in enumerate(zip(saved_group["params"], group["params"], strict=True)):
            state = saved["state"].get(key)
            if not state:
                continue
            for name in names:
                if name not in state:
                    raise ValueError(
                        f"the saved state of parameter {i} of group {k} has no {name!r}; it was saved by another "
                        "optimizer"
                    )
                what = f"the saved {name!r} of parameter {i} of group {k}"
                if name in CODES and isinstance(state[name], Tensor) and state[name].dtype == CODES[name]:
                    if options.of_group(group).moment_dtype(p) != torch.int8:
                        raise ValueError(
                            f"{what} is in eight bits, but this optimizer has wider moments; "
                            "load what widened_state_dict() returned"
                        )
                    check_saved(what, name, state, p)
                    _check_shape(what, state[name], p)
                else:
                    _check_value(what, name, state[name], p)
            if RESIDUAL in state and options.has_master(p):
                raise ValueError(
                    f"the weights of parameter {i} of group {k} were saved with master_weights='24bit', but this "
                    "optimizer has float32 masters; load what widened_state_dict() returned"
                )


def _check_value(what: str, name: str, value: object, p: Tensor) -> None:
    if name in COUNTS:
        if not (isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)):
            raise ValueError(f"{what} must be one number")
        return
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_complex() != p.is_complex():
        kind = "complex" if p.is_complex() else "real"
        raise ValueError(f"{what} must be a dense {kind} tensor")
    if not (value.is_floating_point() or value.is_complex()):
        raise ValueError(f"{what} must be floating-point, not {value.dtype}")
    _check_shape(what, value, p)


def _check_shape(what: str, value: Tensor, p: Tensor) -> None:
    if value.shape != p.shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)}, but the parameter has {tuple(p.shape)}")


def check_entries(labels: list[str], states: list[dict[str, Any]], names: list[str]) -> None:
    """Refuse state from which an entry was removed, or in which an entry is not a tensor.

    Raises:
        ValueError: an entry is missing or is not a tensor.
    """
    for label, state in zip(labels, states, strict=True):
        for name in names:
            scales = SCALE_OF.get(name) if is_coded(state) else None
            if not isinstance(state.get(name), Tensor) or (scales and not isinstance(state.get(scales), Tensor)):
                raise ValueError(
                    f"the state of {label} has no tensor {name!r}; remove the whole state with "
                    "optimizer.state.pop(parameter) to start afresh"
                )


def keep_dtypes(saved: Mapping[str, Any], parameters: Sequence[Tensor], state: Mapping[Any, dict[str, Any]]) -> None:
    """Restore the dtype of state saved in float32 or bfloat16, which torch has cast to the dtype of the parameter."""
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    for key, p in zip(keys, parameters, strict=True):
        for name, value in saved["state"].get(key, {}).items():
            now = state[p][name]
            keeps = isinstance(value, Tensor) and value.dtype in KEPT_DTYPES and p.dtype != torch.float64
            keeps |= isinstance(value, Tensor) and (name in SCALE_OF.values() or value.dtype in CODES.values())
            if keeps and now.dtype != value.dtype:
                state[p][name] = value.to(device=now.device, copy=True)


def keep_formats(entries: dict[str, Any], p: Tensor, options: Options) -> None:
    """Put a parameter's loaded state in the formats of the optimizer, and drop what it does not keep."""
    if options.moment_dtype(p) == torch.int8:
        encode_entries(entries, p)
    master = entries.get("master_weight")
    if options.has_residual(p) and RESIDUAL not in entries and isinstance(master, Tensor):
        entries[RESIDUAL] = residual_of(master)
    if not options.has_master(p):
        entries.pop("master_weight", None)
    if not options.has_residual(p):
        entries.pop(RESIDUAL, None)
