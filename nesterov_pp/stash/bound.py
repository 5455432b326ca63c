"""The weights that the module of a ring computes with, and the changes that its owner makes to them.

[note: what a ring takes over]
The parameters that a module shows are those of one version, so changes to them have to be made to the ring. Freezing
and unfreezing take effect from the next version on: gradients of earlier versions that still arrive are dropped, and
the weight is carried along (the stepped one, where the ring holds predictions). If a parameter is replaced by one of
the same dtype, device and shape, its values become those of the newest version. All other changes cannot be followed;
the next ``use`` or step refuses them rather than undoing them silently.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from operator import attrgetter

import torch
from torch import nn

from nesterov_pp.stash.places import Places, described, likeness

_trains = attrgetter("requires_grad")
SHADOW = -1
"""The number that stands for the weights outside the ring, in place of a slot or a version."""


class Bound:
    """The binding of a module to the leaves of one slot at a time.

    Args:
        module: the module, bound to slot 0.
        names: names of the parameters in the ring.
        slots: the leaves of every slot.
        shadows: the leaves outside the ring, if any.
        gathered: whether ``fully_shard`` keeps some of the leaves, and binds others while the module runs.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        slots: Sequence[Sequence[nn.Parameter]],
        shadows: Sequence[nn.Parameter],
        gathered: bool,
    ) -> None:
        self._names, self._slots, self._shadows = names, slots, shadows
        self._gathered = gathered
        self._places = Places(module, slots[0])
        self._like = [likeness(p) for p in slots[0]]
        self._slot: int | None = 0
        # Whether each parameter requires gradients from the next version on, and whether the leaves of each slot do.
        self._trained = [True] * len(names)
        self._told = [[True] * len(names) for _ in slots]

    @property
    def trained(self) -> list[bool]:
        """For each parameter, whether its next version requires gradients."""
        return self._trained

    def leaves(self, slot: int) -> Sequence[nn.Parameter]:
        """Return the leaves of a slot."""
        return self._shadows if slot == SHADOW else self._slots[slot]

    def bind(self, slot: int, newest: int, *, follow: bool = True) -> None:
        """Make the module compute with the leaves of a slot.

        Raises:
            ValueError: as for ``follow``, which runs first.
        """
        if slot == self._slot:
            return
        if follow:
            self.follow(newest)
        self._slot = None  # neither slot, if the binding is interrupted
        self._places.bind(self.leaves(slot))
        self._slot = slot

    def binds_own(self) -> bool:
        """Return whether the module has the ring's leaves, not others that were put there temporarily."""
        return self._gathered or self._slot is None or self._places.holds_first(self.leaves(self._slot))

    def parts(self) -> list[tuple[nn.Module, dict[str, int]]]:
        """Return each module that has parameters of the ring itself, with their numbers by name."""
        return self._places.parts()

    def leave_shadows(self) -> None:
        """Bind the shadows for good, because the ring will not be used any more."""
        self._places.leave(self._shadows, self._slots)

    def follow(self, newest: int, *, thorough: bool = False) -> None:
        """Take over changes made to the module's parameters. ``newest`` is the slot of the newest version.

        Raises:
            ValueError: a change cannot be taken over; nothing has been changed.
        """
        if self._slot is None:
            return
        leaves = self.leaves(self._slot)
        if not self._gathered:
            found = self._places.replacements(leaves)
            if found and self._slot != newest:
                raise ValueError(
                    f"{self._names[min(found)]} was replaced while the module was bound to other weights than the "
                    "newest; replace parameters outside any block"
                )
            self._places.check_others(leaves)
            if thorough:
                self._check_likeness(leaves)
            if found:
                self._take_over(found, newest)
        if self._slot != SHADOW and list(map(_trains, leaves)) != self._told[self._slot]:
            self._freeze_as(leaves, self._told[self._slot], newest)

    def tell(self, slot: int) -> None:
        """Make the leaves of the next version, in ``slot``, require gradients or not, as ``trained`` says."""
        if self._told[slot] != self._trained:
            for leaf, trains in zip(self._slots[slot], self._trained, strict=True):
                leaf.requires_grad_(trains)
            self._told[slot] = list(self._trained)

    def frozen(self, slot: int) -> list[str]:
        """Return the names of the parameters of a slot that do not require gradients."""
        return [name for name, trains in zip(self._names, self._told[slot], strict=True) if not trains]

    def freeze(self, slot: int, names: Container[str]) -> None:
        """Make the next version, in ``slot``, and those after it require gradients except for ``names``."""
        self._trained = [name not in names for name in self._names]
        self.tell(slot)

    @torch.no_grad()
    def rest(self, slot: int, *, ring_predicts: bool) -> None:
        """Make frozen parameters equal in the newest ``slot`` and outside the ring: what rests is where it will be."""
        for i, trains in enumerate(self._trained):
            if not trains and self._shadows:
                to, of = self._slots[slot][i], self._shadows[i]
                if ring_predicts:
                    to.copy_(of)
                else:
                    of.copy_(to)

    def drop_frozen_gradients(self, slot: int) -> None:
        """Drop the gradients in a slot of parameters that were frozen since the forward."""
        if not all(self._trained):
            for leaf, trains in zip(self._slots[slot], self._trained, strict=True):
                if not trains:
                    leaf.grad = None

    def _check_likeness(self, leaves: Sequence[nn.Parameter]) -> None:
        now = [likeness(leaf) for leaf in leaves]
        if now != self._like:
            i = next(i for i, (one, other) in enumerate(zip(now, self._like, strict=True)) if one != other)
            dtype, device, shape = self._like[i]
            raise ValueError(
                f"{self._names[i]} has become a {described(leaves[i])} in the version that the module is bound to, but "
                f"was built as {dtype} of shape {tuple(shape)} on {device}; "
                "convert or move a module before its WeightStash is built"
            )

    @torch.no_grad()
    def _take_over(self, found: dict[int, nn.Parameter], newest: int) -> None:
        for i, p in found.items():
            for leaves in (self._slots[newest], self._shadows):
                if leaves:
                    leaves[i].copy_(p)
            leaf = self._slots[newest][i]
            if p.grad is not None:
                leaf.grad = p.grad if leaf.grad is None else leaf.grad + p.grad
            leaf.requires_grad_(p.requires_grad)
        self._places.bind(self._slots[newest])

    def _freeze_as(self, leaves: Sequence[nn.Parameter], told: list[bool], newest: int) -> None:
        for i, leaf in enumerate(leaves):
            if leaf.requires_grad != told[i]:
                self._trained[i] = told[i] = self._told[newest][i] = leaf.requires_grad
                self._slots[newest][i].requires_grad_(leaf.requires_grad)
