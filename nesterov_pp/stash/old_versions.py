"""The versions of a ring older than the newest, kept in a short form and decoded one at a time.

[note: where an older version lies]
A step reads the newest version and writes the next one to other memory, so a ring needs two full versions whatever it
does with the older ones. Between two steps the second one is free. It is the buffer into which an older version is
decoded, all its parameters at once, before the module runs or goes backward with it. So a ring keeps two versions in
full and a row for each older one. Slots share these two memories in turn: version v has leaves of its own, to which its
gradients go, and lies in memory ``v % 2`` while it is the newest.

Where an older version would have to lie in the memory of the newest, its leaves point to the buffer while they are
shown, and to their own memory afterwards. Leaves whose memory changes between forward and backward are what autograd
gets silently wrong (see ``ring``), so everything that autograd saves of them is replaced by its place, and looked up
when backward asks for it.

[note: errors do not need feedback]
Let d be a difference of two successive versions and d' what is kept of it. Version k decodes to the newest version
minus all d' since, so its error is the sum of ``d - d'`` since k. Adding to every d the error r of the one before it
would make that ``r_now - r_k``, which does not grow, but r would have to be kept as well: a byte a parameter if rounded
to 8 bits. Errors of rounding are independent, so over seven differences their sum is sqrt(7 / 2) = 1.9 times as large
as that (measured: twice), and the distance over seven updates, of which the error is a share, grows at least as fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from nesterov_pp.stash.forms import Form, SavedRow, load_rows, new_form
from nesterov_pp.stash.position import Position


class ShortVersions:
    """The older versions of a ring, and the buffer into which they are decoded.

    Args:
        form: the form of the older versions.
        position: the position of the ring.
        names: the names of the parameters.
        slots: the leaves of every slot.
        memory: where they lie: slot ``s`` in ``memory[s % len(memory)]``. The one after that of the newest version is
            the buffer. If there are more than two, all versions of the ring are there in full as well.
    """

    def __init__(
        self,
        form: str,
        position: Position,
        names: Sequence[str],
        slots: Sequence[Sequence[nn.Parameter]],
        memory: Sequence[Sequence[Tensor]],
    ) -> None:
        self.exact = len(memory) > 2
        self.form = form
        self._position, self._names, self._slots, self._memory = position, names, slots, memory
        self._rows: Form = new_form(form, memory[0], position.versions - 1)
        # What the buffer holds: a version, and whether it is exact or decoded. None: something else.
        self._held: tuple[int, bool] | None = None
        self._shown: int | None = None  # the slot whose leaves point to the buffer

    @property
    def nbytes(self) -> int:
        """The bytes of the rows."""
        return self._rows.nbytes

    @property
    def places(self) -> Sequence[Sequence[Tensor]]:
        """The lists of tensors in whose memory a forward finds its weights."""
        return self._memory

    def weights(self, version: int) -> Sequence[Tensor]:
        """Return the weights of a version as backward uses them: in the newest slot or, decoded, in the buffer.

        Raises:
            RuntimeError: the version is not in the ring.
        """
        position = self._position
        if version == position.newest:
            return self._slots[position.newest_slot]
        if not position.oldest <= version < position.newest:
            raise RuntimeError(
                f"this backward needs version {version}, which has left the ring of versions {position.oldest} to "
                f"{position.newest}; step it earlier, or keep more than {position.versions} versions"
            )
        self._fill(version, None)
        return self._buffer()

    def show(self, version: int, exactly: Mapping[str, Tensor] | None = None) -> None:
        """Make an older version readable in its leaves: decoded, or with the weights that are given."""
        slot = self._position.slot_of(version)
        if self._shown != slot:
            self.rest()
        self._fill(version, exactly)
        buffer = self._buffer()
        if self._memory[slot % len(self._memory)] is not buffer:
            self._shown = slot
            for leaf, t in zip(self._slots[slot], buffer, strict=True):
                leaf.data = t

    def rest(self) -> None:
        """Let the leaves that are shown point to their own memory again."""
        if self._shown is not None:
            own = self._memory[self._shown % len(self._memory)]
            for leaf, t in zip(self._slots[self._shown], own, strict=True):
                leaf.data = t
            self._shown = None

    def forget(self) -> None:
        """Note that the buffer or the newest version may be written by something else now."""
        self._held = None

    @torch.no_grad()
    def follow(self) -> None:
        """Take over the values of leaves of the newest version that were pointed to other memory (``p.data = ...``)."""
        slot = self._position.newest_slot
        for leaf, own in zip(self._slots[slot], self._memory[slot % len(self._memory)], strict=True):
            if leaf.data_ptr() != own.data_ptr() and leaf.shape == own.shape and leaf.dtype == own.dtype:
                own.copy_(leaf)
                leaf.data = own

    def keep(self) -> None:
        """Keep the version before the newest, which a step has just written; doing so twice changes nothing."""
        self.rest()
        self.forget()
        before = self._position.newest - 1
        slot, row = before % len(self._slots), self._row(before)
        self._rows.keep(row, self._slots[slot], self._slots[self._position.newest_slot])

    def saved(self) -> list[SavedRow]:
        """Return the rows of the older versions, oldest first, not copied."""
        position = self._position
        return [self._rows.row(self._row(v)) for v in range(position.oldest, position.newest)]

    def load(self, rows: Sequence[SavedRow]) -> None:
        """Copy rows that ``saved`` returned."""
        self.forget()
        position = self._position
        load_rows(self._rows, [self._row(v) for v in range(position.oldest, position.newest)], rows)

    @torch.no_grad()
    def load_in_full(self, versions: Sequence[Sequence[Tensor]]) -> None:
        """Keep versions that are given in full, oldest first, the newest last."""
        self.forget()
        oldest = self._position.oldest
        for k, (version, following) in enumerate(pairwise(versions)):
            # Laid out in memory like the parameters, which those of a checkpoint need not be.
            pair = [
                [torch.empty_like(own).copy_(t) for own, t in zip(self._memory[0], which, strict=True)]
                for which in (version, following)
            ]
            self._rows.keep(self._row(oldest + k), *pair)

    # ------------------------------------------------------------------ inside

    def _row(self, version: int) -> int:
        return version % (self._position.versions - 1)

    def _buffer(self) -> Sequence[Tensor]:
        return self._memory[(self._position.newest + 1) % len(self._memory)]

    @torch.no_grad()
    def _fill(self, version: int, exactly: Mapping[str, Tensor] | None) -> None:
        content = version, exactly is not None
        if self._held == content:
            return
        self._held = None
        buffer, newest = self._buffer(), self._position.newest
        if exactly is None:
            rows = [self._row(v) for v in range(newest - 1, version - 1, -1)]
            self._rows.restore(self._slots[self._position.newest_slot], rows, buffer)
            if buffer:
                # So that autograd raises where it would use what the buffer held before.
                torch.autograd.graph.increment_version(list(buffer))
        else:
            for name, t in zip(self._names, buffer, strict=True):
                t.copy_(exactly[name])
        self._held = content
