"""Checks of a saved ring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nesterov_pp.stash.forms import SavedRow, check_rows, restored


@dataclass(frozen=True)
class SavedRing:
    """A checked state of a ring.

    Attributes:
        newest: its newest version.
        weights: the versions that are there in full, oldest first, by the parameters' names: all, or the newest.
        form: the form of the older versions.
        older: the older versions in that form, oldest first, if it is not "full".
        shadow: the weights outside the ring, if it has any.
        frozen: the names of the parameters that are frozen in each version, oldest first.
    """

    newest: int
    weights: list[dict[str, Tensor]]
    form: str
    older: list[SavedRow]
    shadow: dict[str, Tensor] | None
    frozen: list[Sequence[str]]

    @property
    def newest_weights(self) -> dict[str, Tensor]:
        return self.weights[-1]

    def fits(self, form: str, like: Sequence[Tensor]) -> bool:
        """Return whether the older versions are in this form, of tensors laid out in memory like these."""
        strides = [t.stride() for t in self.newest_weights.values()]
        return self.form == form and strides == [t.stride() for t in like]

    def in_full(self) -> list[dict[str, Tensor]]:
        """Return all versions, oldest first, decoding those that are not there in full."""
        if len(self.weights) > len(self.older):
            return self.weights
        newest = self.newest_weights
        versions = restored(self.form, list(newest.values()), self.older)
        return [*(dict(zip(newest, version, strict=True)) for version in versions), newest]


def check_saved(state: dict[str, Any], like: Mapping[str, Tensor], versions: int, *, has_shadow: bool) -> SavedRing:
    """Check a saved ring, and return it.

    Args:
        state: the state that ``WeightStash.state_dict`` returned.
        like: the parameters of one version of this ring.
        versions: the length of this ring.
        has_shadow: whether this ring has a shadow, weights outside the ring.

    Raises:
        ValueError: the state is of a ring of another length or of other parameters.
    """
    newest, weights = _parts_of(state)
    form, older = state.get("old_versions", "full"), state.get("older", [])
    live = len(weights) if form == "full" or not isinstance(older, list) else len(older) + 1
    if live != min(newest + 1, versions):
        raise ValueError(
            f"the saved ring holds {live} versions at version {newest}; "
            f"this one keeps {versions} and needs {min(newest + 1, versions)}"
        )
    if len(weights) not in (1, live):
        raise ValueError(f"the saved ring has {len(weights)} of its {live} versions in full; it takes one or all")
    shadow = state.get("shadow", state.get("beside"))  # "beside" is its former name
    if has_shadow != (shadow is not None) or not isinstance(shadow, dict | None):
        raise ValueError("only one of the saved ring and this ring has a shadow (weights outside the ring)")
    for saved in weights if shadow is None else [*weights, shadow]:
        _check_weights(saved, like)
    if form != "full":
        check_rows(form, list(like.values()), older)
    frozen = state.get("frozen", [[]] * live)
    known = isinstance(frozen, list) and len(frozen) == live and all(isinstance(n, list) for n in frozen)
    if not known or not {name for names in frozen for name in names} <= like.keys():
        raise ValueError("the 'frozen' of a saved ring must be one list of its parameters' names for each version")
    return SavedRing(newest, weights, form, older, shadow, frozen)


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
