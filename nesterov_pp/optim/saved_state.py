"""Checks of a loaded optimizer state, and the dtypes that are kept from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nesterov_pp.optim.counts import COUNTS

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
    saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], hyperparameters: list[str], names: list[str]
) -> None:
    """Refuse the state of another optimizer, or of parameters of other shapes.

    Raises:
        ValueError: a hyper-parameter or an entry is missing, or an entry is malformed or of another shape.
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
                _check_value(f"the saved {name!r} of parameter {i} of group {k}", name, state[name], p)


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
    if value.shape != p.shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)}, but the parameter has {tuple(p.shape)}")


def check_entries(labels: list[str], states: list[dict[str, Any]], names: list[str]) -> None:
    """Refuse state from which an entry was removed, or in which an entry is not a tensor.

    Raises:
        ValueError: an entry is missing or is not a tensor.
    """
    for label, state in zip(labels, states, strict=True):
        for name in names:
            if not isinstance(state.get(name), Tensor):
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
            if keeps and now.dtype != value.dtype:
                state[p][name] = value.to(device=now.device, copy=True)
