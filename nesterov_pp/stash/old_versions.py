"""The versions of a ring older than the newest, kept in a short form and decoded when they are needed.

[note: where the versions lie]
A ring keeps one version in full, the newest, and a row for each older one. Every version has leaves of its own, which
its gradients go to, and all leaves share the memory of the newest.

A step must not write over the weights while their difference to the next ones is still to be encoded. It is
element-wise, so it can write the next weights over the gradients, which are read for the last time in the same pass:
for the step, the leaves of the next version point there. Then the row is encoded, and the new weights are copied back.
Where a gradient is no memory of its own (a view, a tensor that others hold, another layout), the step writes to new
memory.

Backward gets the weights that it saved one tensor at a time, each decoded to memory that is free again after its use.
Only what reads all weights of an older version (a forward, also one that runs again, a correction, a step that does not
write over gradients) has them decoded to a buffer, which is allocated then and stays. While they are shown, the leaves
of the version point to the buffer. Leaves whose memory changes between forward and backward are what autograd gets
silently wrong (see ``ring``), so everything that autograd saves of them is replaced by its place, and looked up when
backward asks for it.

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
    """The older versions of a ring.

    Args:
        form: the form of the older versions.
        position: the position of the ring.
        names: the names of the parameters.
        slots: the leaves of every slot.
        memory: where they lie: slot ``s`` in ``memory[s % len(memory)]``. If there are several, all versions of the
            ring are there in full as well, and the one after that of the newest version is the buffer.
    """

    def __init__(
        self,
        form: str,
        position: Position,
        names: Sequence[str],
        slots: Sequence[Sequence[nn.Parameter]],
        memory: Sequence[Sequence[Tensor]],
    ) -> None:
        self.exact = len(memory) > 1
        self.form = form
        self._position, self._names, self._slots, self._memory = position, names, slots, memory
        self._rows: Form = new_form(form, memory[0], position.versions - 1)
        self._spare: list[Tensor] = []  # the buffer of a ring with one memory, once it is needed
        self._scratch = torch.empty(0, dtype=torch.uint8, device="cpu")  # for one weight at a time
        # What the buffer holds: a version, and whether it is exact or decoded. None: something else.
        self._held: tuple[int, bool] | None = None
        self._shown: int | None = None  # the slot whose leaves point to the buffer
        # Where the running step writes, whose gradients it may write over, and whether its row has been encoded since.
        self._target: list[Tensor] = []
        self._grads_of: Sequence[nn.Parameter] = []
        self._encoded = False

    @property
    def nbytes(self) -> int:
        """The bytes of the rows, and of what they are decoded into beside the memory of the slots."""
        return self._rows.nbytes + sum(t.nbytes for t in self._spare) + self._scratch.nbytes

    def places(self, version: int) -> Sequence[Sequence[Tensor]]:
        """Return the lists of tensors in whose memory a forward with a version finds its weights."""
        if self.exact or version == self._position.newest:
            return self._memory
        return [*self._memory, self._buffer()]

    def weight(self, version: int, number: int) -> Tensor:
        """Return a weight of a version as backward uses it: in the newest slot or, decoded, in memory of its own.

        Raises:
            RuntimeError: the version is not in the ring.
        """
        position = self._position
        newest = self._slots[position.newest_slot]
        if version == position.newest:
            return newest[number]
        if not position.oldest <= version < position.newest:
            raise RuntimeError(
                f"this backward needs version {version}, which has left the ring of versions {position.oldest} to "
                f"{position.newest}; step it earlier, or keep more than {position.versions} versions"
            )
        if self.exact:
            self._fill(version, None)
        if self._held == (version, False):
            return self._buffer()[number]
        out = self._memory_for_one(self._memory[0][number])
        self._rows.restore_one(number, newest[number], self._rows_since(version), out)
        return out

    def show(self, version: int, exactly: Mapping[str, Tensor] | None = None) -> None:
        """Make an older version readable in its leaves: decoded, or with the weights that are given."""
        slot = self._position.slot_of(version)
        if self._shown != slot:
            self.rest()
        self._fill(version, exactly)
        buffer = self._buffer()
        if self._memory[slot % len(self._memory)] is not buffer:
            self._shown = slot
            _point(self._slots[slot], buffer)

    def rest(self) -> None:
        """Let the leaves that are shown point to their own memory again."""
        if self._shown is not None:
            _point(self._slots[self._shown], self._memory[self._shown % len(self._memory)])
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

    # ------------------------------------------------------------------ a step

    @torch.inference_mode(False)
    def begin_step(self, version: int, *, over_gradients: bool) -> None:
        """Point the leaves of the next version to the memory that a step with the gradients of a version writes.

        That is the memory of the gradients, or else the buffer; then the weights of ``version`` can be read as well.
        """
        position = self._position
        if over_gradients and not self.exact:
            self.rest()
            self._grads_of = self._slots[position.slot_of(version)]
            target = list(map(_target_of, self._memory[0], _lent(self._grads_of, self._memory[0])))
        else:
            if version != position.newest:
                self.show(version)
            target, self._grads_of = [] if self.exact else list(self._buffer()), []
        self.forget()
        self._target, self._encoded = target, False
        if target:
            _point(self._next_leaves(), target)

    def drop_step(self) -> None:
        """Let go of the memory for a step that has not been run."""
        if self._target and not self._position.to_clear:
            self.rest()
            _point(self._next_leaves(), self._memory[0])
            self._target, self._grads_of = [], []

    def spoil_step(self) -> None:
        """Drop the gradients of a step that failed half way, and may have written over some of them."""
        for leaf in self._grads_of:
            leaf.grad = None

    @torch.no_grad()
    def keep(self) -> None:
        """Keep the version before the newest, which a step has just written; doing so twice changes nothing."""
        newest = self._position.newest
        leaves, row = self._slots[newest % len(self._slots)], self._row(newest - 1)
        self.rest()
        self.forget()
        if self.exact:
            self._rows.keep(row, self._slots[(newest - 1) % len(self._slots)], leaves)
        elif self._target:
            if not self._encoded:
                self._rows.keep(row, self._memory[0], self._target)
                self._encoded = True
            own = list(self._memory[0])
            with torch.autograd.grad_mode._unsafe_preserve_version_counter(tuple(own)):  # the step has counted it
                torch._foreach_copy_(own, self._target)
            _point(leaves, self._memory[0])
            self._target, self._grads_of = [], []

    # ------------------------------------------------------------------ checkpoints

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

    def _rows_since(self, version: int) -> list[int]:
        return [self._row(v) for v in range(self._position.newest - 1, version - 1, -1)]

    def _next_leaves(self) -> Sequence[nn.Parameter]:
        return self._slots[(self._position.newest + 1) % len(self._slots)]

    @torch.inference_mode(False)
    def _memory_for_one(self, like: Tensor) -> Tensor:
        """Return memory for a weight that backward needs for one node; on the CPU the same each time.

        A GPU's allocator keeps what autograd frees, and knows which stream still reads it.
        """
        if not like.is_cpu:
            return torch.empty_like(like)
        storage = self._scratch.untyped_storage()
        if self._scratch.nbytes < like.nbytes or torch._C._storage_Use_Count(storage._cdata) > _HOLDERS:
            memory = torch.empty(like.nbytes, dtype=torch.uint8, device="cpu")
            if self._scratch.nbytes < memory.nbytes:
                self._scratch = memory
        else:
            memory = self._scratch[: like.nbytes]
        return torch.as_strided(memory.view(like.dtype), like.shape, like.stride())

    @torch.inference_mode(False)
    def _buffer(self) -> Sequence[Tensor]:
        if self.exact:
            return self._memory[(self._position.newest + 1) % len(self._memory)]
        if not self._spare:
            self._spare = list(map(torch.empty_like, self._memory[0]))
        return self._spare

    @torch.no_grad()
    def _fill(self, version: int, exactly: Mapping[str, Tensor] | None) -> None:
        content = version, exactly is not None
        if self._held == content:
            return
        self._held = None
        buffer = self._buffer()
        if exactly is None:
            self._rows.restore(self._slots[self._position.newest_slot], self._rows_since(version), buffer)
            if buffer:
                # So that autograd raises where it would use what the buffer held before.
                torch.autograd.graph.increment_version(list(buffer))
        else:
            for name, t in zip(self._names, buffer, strict=True):
                t.copy_(exactly[name])
        self._held = content


def _point(leaves: Sequence[nn.Parameter], memory: Sequence[Tensor]) -> None:
    for leaf, t in zip(leaves, memory, strict=True):
        leaf.data = t


def _lent(leaves: Sequence[nn.Parameter], memory: Sequence[Tensor]) -> list[Tensor | None]:
    """Return, for each leaf, the memory where a step can write its next weights: its gradient's, if that is its own.

    A leaf without a gradient is not stepped, so its next weights are written where they are.
    """
    return [own if leaf.grad is None else _own_memory(leaf.grad, own) for leaf, own in zip(leaves, memory, strict=True)]


def _own_memory(grad: Tensor, like: Tensor) -> Tensor | None:
    """Return a gradient without its history if nothing else has its memory, and it is laid out like its weight."""
    plain = type(grad) is Tensor and grad.layout == torch.strided and not grad.is_neg() and not grad._is_zerotensor()
    if not plain or grad.requires_grad or grad.is_inference() or (grad.dtype, grad.device) != (like.dtype, like.device):
        return None
    storage = grad.untyped_storage()
    # Autograd may give views of one tensor to several leaves as gradients, or what a peer is still to be sent.
    alone = storage.nbytes() == grad.nbytes and torch._C._storage_Use_Count(storage._cdata) <= _HOLDERS
    return grad.detach() if alone and grad.shape == like.shape and grad.stride() == like.stride() else None


_HOLDERS = 2
"""The holders of memory that is nobody else's: its tensor, and the storage that is asked."""


def _target_of(own: Tensor, lent: Tensor | None) -> Tensor:
    return torch.empty_like(own) if lent is None else lent
