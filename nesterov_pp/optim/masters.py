"""Float32 master copies of low-precision parameters."""

from __future__ import annotations

import torch
from torch import Tensor


class MasterWeights:
    """Keeps master weights with the parameters they belong to.

    A step writes both. Where something else wrote a parameter since, such as ``model.load_state_dict``, its master
    takes over the elements that differ from the master's rounded value; the others keep the bits that rounding would
    lose, so the order in which a checkpoint's model and optimizer are loaded does not matter. Writes through ``.data``
    go unnoticed until the optimizer loads a state.
    """

    def __init__(self, slots: list[list[Tensor]], masters: list[Tensor | None]) -> None:
        """``slots[s][i]`` is parameter ``i`` in ring slot ``s``, ``masters[i]`` its master, None without."""
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
        """Note that the parameters of a slot were written from their masters just now."""
        if self._pairs and self._pairs[0]:
            self._versions = self._now(slot)

    def _now(self, slot: int) -> list[int]:
        return [p._version for p, _ in self._pairs[slot]]
