"""The places where a module keeps the parameters of a ring, and changes that others made there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from operator import getitem, is_, setitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class _Place(NamedTuple):
    """An entry ``key`` of a submodule's parameters, which holds parameter ``number`` of the ring."""

    module: nn.Module
    key: str
    number: int
    name: str


class Places:
    """The places of a module to which lists of leaves are bound; finds what was put there instead.

    Args:
        module: the module.
        first: the module's parameters that are in the ring; a tied parameter has several places.
    """

    def __init__(self, module: nn.Module, first: Sequence[nn.Parameter]) -> None:
        self._module = module
        index = {id(p): i for i, p in enumerate(first)}
        self._all = [
            _Place(submodule, key, index[id(p)], f"{prefix}.{key}" if prefix else key)
            for prefix, submodule in module.named_modules()
            for key, p in submodule._parameters.items()
            if p is not None and id(p) in index
        ]
        self._containers = [place.module._parameters for place in self._all]
        self._keys = [place.key for place in self._all]
        self._order = [place.number for place in self._all]
        # Recurrent layers read their weights from a list of their own, which Module.to rebuilds.
        self._lists = [
            (submodule, k, index[id(p)])
            for submodule in module.modules()
            if isinstance(submodule, nn.RNNBase)
            for k, p in enumerate(submodule._flat_weights)
            if p is not None and id(p) in index
        ]
        self._note_structure()

    def bind(self, leaves: Sequence[Tensor]) -> None:
        """Make the module compute with ``leaves``."""
        now: Iterable[Any] = map(leaves.__getitem__, self._order)
        deque(map(setitem, self._containers, self._keys, now), maxlen=0)
        for submodule, k, i in self._lists:
            submodule._flat_weights[k] = leaves[i]

    def parts(self) -> list[tuple[nn.Module, dict[str, int]]]:
        """Return each module that has parameters of the ring itself, with their numbers by name."""
        parts: dict[int, tuple[nn.Module, dict[str, int]]] = {}
        for place in self._all:
            parts.setdefault(id(place.module), (place.module, {}))[1][place.key] = place.number
        return list(parts.values())

    def leave(self, others: Sequence[nn.Parameter], slots: Sequence[Sequence[nn.Parameter]]) -> None:
        """Bind ``others`` wherever a leaf of the ring's ``slots`` is still bound."""
        known = {id(leaf) for slot in slots for leaf in slot}
        for container, key, i in zip(self._containers, self._keys, self._order, strict=True):
            leaf = container.get(key)
            if leaf is not None and id(leaf) in known:
                container[key] = others[i]
                others[i].requires_grad_(leaf.requires_grad)
        for submodule, k, i in self._lists:
            if id(submodule._flat_weights[k]) in known:
                submodule._flat_weights[k] = others[i]

    def holds_first(self, leaves: Sequence[Tensor]) -> bool:
        """Return whether ``leaves`` are bound, judging by the first place."""
        return not self._all or self._containers[0].get(self._keys[0]) is leaves[self._order[0]]

    def replacements(self, leaves: Sequence[Tensor]) -> dict[int, nn.Parameter]:
        """Return, by index, the parameters that have replaced ``leaves`` where these were bound.

        Raises:
            ValueError: a replacement is not one that a ring can take over.
        """
        try:
            now = list(map(getitem, self._containers, self._keys))
            if all(map(is_, now, map(leaves.__getitem__, self._order))):
                return {}
        except KeyError:
            pass
        found: dict[int, tuple[str, nn.Parameter]] = {}
        kept: dict[int, str] = {}
        for place in self._all:
            entry = place.module._parameters.get(place.key)
            leaf = leaves[place.number]
            if entry is leaf:
                kept[place.number] = place.name
                continue
            _check_replacement(place, entry, leaf)
            assert entry is not None
            name, other = found.setdefault(place.number, (place.name, entry))
            if other is not entry and not torch.equal(other, entry):
                raise ValueError(
                    f"{place.name} and {name} are one parameter in two places, and were replaced by two that differ; "
                    "put the same Parameter into both"
                )
        for i, (name, _) in found.items():
            if i in kept:
                raise ValueError(
                    f"{name} was replaced, but not {kept[i]}, which was the same parameter when the WeightStash was "
                    "built; put the same Parameter into both places, or untie them and build a new WeightStash"
                )
        return {i: entry for i, (_, entry) in found.items()}

    def check_others(self, leaves: Sequence[Tensor]) -> None:
        """Check that no other parameter of the module is to be trained. ``leaves`` are the bound ones.

        Raises:
            ValueError: a parameter outside the ring requires gradients, or one of the ring is not in the module.
        """
        others = map(dict.get, self._others, self._other_keys)
        if any(p.requires_grad for p in others if p is not None):
            self._look_again(leaves)
        same = all(map(is_, map(dict.get, self._parents, self._child_keys), self._children))
        if not same or [*map(len, self._entries), *map(len, self._parts)] != self._counts:
            self._look_again(leaves)
            self._note_structure()

    def _look_again(self, leaves: Sequence[Tensor]) -> None:
        own = set(map(id, leaves)) | set(map(id, map(dict.get, self._containers, self._keys)))
        there = set()
        for name, p in self._module.named_parameters():
            there.add(id(p))
            if id(p) not in own and p.requires_grad:
                raise ValueError(
                    f"{name} requires gradients, but is not in the WeightStash, which would never train it: it was "
                    "frozen or absent when the stash was built; build the stash or pipeline while it is trainable, and "
                    "freeze it afterwards"
                )
        for place in self._all:
            if id(leaves[place.number]) not in there:
                raise ValueError(
                    f"{place.name} is no longer a parameter of the module, but its WeightStash trains it; "
                    "build a new WeightStash on the module as it is"
                )

    def _note_structure(self) -> None:
        own = {(id(container), key) for container, key in zip(self._containers, self._keys, strict=True)}
        modules = list(self._module.modules())
        others = [(m._parameters, key) for m in modules for key in m._parameters if (id(m._parameters), key) not in own]
        self._others, self._other_keys = [c for c, _ in others], [key for _, key in others]
        children = [(m._modules, key, child) for m in modules for key, child in m._modules.items()]
        self._parents, self._child_keys = [c for c, _, _ in children], [key for _, key, _ in children]
        self._children = [child for _, _, child in children]
        self._entries, self._parts = [m._parameters for m in modules], [m._modules for m in modules]
        self._counts = [*map(len, self._entries), *map(len, self._parts)]


def _check_replacement(place: _Place, entry: Tensor | None, leaf: Tensor) -> None:
    if parametrize.is_parametrized(place.module, place.key):
        raise ValueError(
            f"{place.name} was parametrized after the WeightStash was built, which still holds the original parameter; "
            "parametrize first, then build the stash"
        )
    if entry is None:
        raise ValueError(
            f"{place.name} was taken out of the module, but its WeightStash trains it; "
            "build a new WeightStash on the module as it is"
        )
    unlike = likeness(entry) != likeness(leaf) or entry.layout != leaf.layout
    if unlike or not isinstance(entry, nn.Parameter) or hasattr(entry, "to_local") != hasattr(leaf, "to_local"):
        raise ValueError(
            f"{place.name} was replaced by a {described(entry)}; "
            f"a WeightStash only takes over a replacement that is like its other versions, a {described(leaf)}"
        )


def likeness(t: Tensor) -> tuple[torch.dtype, torch.device, torch.Size]:
    """Return the properties that all versions of a parameter have in common."""
    return t.dtype, t.device, t.shape


def described(t: Tensor) -> str:
    """Return a description of a tensor for display."""
    kind = "Parameter" if isinstance(t, nn.Parameter) else "tensor that is not a Parameter"
    return f"{str(t.dtype).removeprefix('torch.')} {kind} of shape {tuple(t.shape)} on {t.device}"
