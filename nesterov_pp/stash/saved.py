"""Checks of a saved ring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def check_saved(
    state: dict[str, Any], like: Mapping[str, Tensor], versions: int, *, has_shadow: bool
) -> tuple[int, list[dict[str, Tensor]], dict[str, Tensor] | None]:
    """Check a saved ring; return its newest version, its weights (oldest first) and its shadow.

    Args:
        state: the state that ``WeightStash.state_dict`` returned.
        like: the parameters of one version of this ring.
        versions: the length of this ring.
        has_shadow: whether this ring has a shadow, weights outside the ring.

    Raises:
        ValueError: the state is of a ring of another length or of other parameters.
    """
    newest, weights = _parts_of(state)
    if len(weights) != min(newest + 1, versions):
        raise ValueError(
            f"the saved ring holds {len(weights)} versions at version {newest}; "
            f"this one keeps {versions} and needs {min(newest + 1, versions)}"
        )
    shadow = state.get("shadow", state.get("beside"))  # "beside" is its former name
    if has_shadow != (shadow is not None) or not isinstance(shadow, dict | None):
        raise ValueError("only one of the saved ring and this ring has a shadow (weights outside the ring)")
    for saved in weights if shadow is None else [*weights, shadow]:
        _check_weights(saved, like)
    frozen = state.get("frozen", [[]] * len(weights))
    known = isinstance(frozen, list) and len(frozen) == len(weights) and all(isinstance(n, list) for n in frozen)
    if not known or not {name for names in frozen for name in names} <= like.keys():
        raise ValueError("the 'frozen' of a saved ring must be one list of its parameters' names for each version")
    return newest, weights, shadow


def _check_weights(saved: dict[str, Tensor], like: Mapping[str, Tensor]) -> None:
    names: Sequence[str] = list(like)
    if list(saved) != names:
        unlike = sorted(set(saved) ^ set(names)) or ["the order"]
        raise ValueError(f"the saved ring is of another module: {', '.join(unlike[:3])} differ")
    for name, leaf in like.items():
        if not isinstance(saved[name], Tensor):
            raise ValueError(f"{name} was saved as {type(saved[name]).__name__}, not as a tensor")
        if saved[name].shape != leaf.shape or saved[name].dtype != leaf.dtype:
            raise ValueError(
                f"{name} was saved as {saved[name].dtype} of shape {tuple(saved[name].shape)}, "
                f"but is {leaf.dtype} of shape {tuple(leaf.shape)} here"
            )


def _parts_of(state: object) -> tuple[int, list[dict[str, Tensor]]]:
    newest = state.get("newest") if isinstance(state, dict) else None
    weights = state.get("weights") if isinstance(state, dict) else None
    whole = isinstance(newest, int) and newest >= 0 and isinstance(weights, list)
    if not whole or not all(isinstance(saved, dict) for saved in weights or []):
        raise ValueError(
            "load_state_dict takes what WeightStash.state_dict() returned: a dict with 'newest', a version from 0, and "
            "'weights', a list of dicts"
        )
    return newest, weights  # type: ignore[return-value]
