"""Bindings of the module of a ring to a version, made by blocks and by running backwards."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from nesterov_pp.stash.bound import SHADOW, Bound
from nesterov_pp.stash.old_versions import ShortVersions
from nesterov_pp.stash.position import Position
from nesterov_pp.stash.reads import ReadsOf
from nesterov_pp.stash.watch import Ending, Watch


def _nodes() -> int:
    """Return how many autograd nodes this thread has created."""
    return int(torch._C._autograd._get_sequence_nr())


class Binding:
    """A temporary binding of the module to a version.

    Attributes:
        version: version of the weights; SHADOW for the weights outside the ring.
        linearise_at: as in ``WeightStash.use``.
        task: autograd's id of the backward; None for a block.
        backward: whether the module only runs again inside, for a backward.
        weights: the weights of ``version``, for a ring that has them no more exactly.
        waits: whether an older version is decoded for the module only once something reads it.
        counted: whether the block counts as a microbatch in flight.
        ran_backward: whether a backward of this version ran inside the block.
        nodes: number of autograd nodes before the block.
    """

    def __init__(
        self,
        version: int,
        linearise_at: str,
        task: int | None = None,
        *,
        backward: bool = False,
        weights: Mapping[str, Tensor] | None = None,
        waits: bool = False,
    ) -> None:
        self.version, self.linearise_at, self.task = version, linearise_at, task
        self.backward, self.weights, self.waits = backward or task is not None, weights, waits
        self.counted = self.ran_backward = False
        self.nodes = _nodes()


class Bindings:
    """The bindings of a module: to the version of the innermost block or backward, else to the newest."""

    def __init__(self, position: Position, bound: Bound, old: ShortVersions | None = None) -> None:
        self._position, self._bound, self._old = position, bound, old
        self._all: list[Binding] = []
        self.watch = Watch(self)
        self._is_compiled = False  # whether compiled code of the module has run

    @property
    def version(self) -> int:
        """The version that the module is bound to."""
        return self._all[-1].version if self._all else self._position.newest

    @property
    def is_newest(self) -> bool:
        """Whether no block and no running backward binds the module, so that it has the newest version."""
        return not self._all

    def rebind(self, *, follow: bool = True) -> None:
        """Bind the module to the version that it should have now.

        Raises:
            ValueError: with ``follow``, if the module's parameters were changed in a way that the ring cannot follow.
        """
        position, version = self._position, self.version
        slot = SHADOW if version == SHADOW else max(version, position.oldest) % position.slots
        self._bound.bind(slot, position.newest_slot, follow=follow)
        if self._old is not None:
            self._show(self._old)

    def rest(self) -> None:
        """Let go of an older version that ``WeightStash.show`` has left in the buffer."""
        if self._old is not None and self.shows() is None:
            self._old.rest()

    def shows(self) -> int | None:
        """Return the older version whose weights the module computes with, from the buffer; None without one."""
        old, binding = self._old, self._all[-1] if self._all else None
        if old is None or binding is None or not self._position.oldest <= binding.version < self._position.newest:
            return None
        # Other backwards read no weights of the version, and an exact forward does not need the buffer.
        reads = binding.linearise_at == "version" if binding.backward else not old.exact
        return binding.version if reads and not binding.waits else None

    def read(self) -> None:
        """Decode the older version that the module is bound to, since something reads its weights now."""
        if self._all and self._all[-1].waits:
            self._all[-1].waits = False
            self.rebind(follow=False)

    def waiting(self) -> Sequence[nn.Parameter]:
        """Return the leaves that the module is bound to, if they do not have the values of their version yet."""
        old, binding = self._old, self._all[-1] if self._all else None
        if old is None or binding is None or not binding.waits:
            return ()
        return self._bound.leaves(binding.version % self._position.slots)

    @contextmanager
    def block(self, binding: Binding, *, counts: bool = False) -> Iterator[None]:
        """Bind the module as ``binding`` says; with ``counts``, a forward in the block is a microbatch in flight."""
        outer = self._innermost_block()
        if outer is not None and self.watch.ran_compiled:
            self._tally(outer)
        self._took_compiled()
        binding.waits = binding.waits and self._can_wait(binding)
        failed = True
        # Removes the binding if leaving the block is interrupted itself.
        ending = Ending(partial(_end, weakref.ref(self), binding))
        try:
            self._all.append(binding)
            self.rebind()
            with ReadsOf(self) if binding.waits else nullcontext():
                yield
            if counts:
                self._tally(binding)
            failed = False
        finally:
            if failed:
                self.watch.forget()
                if binding.counted:
                    self._position.count(binding.version, -1)
            if outer is not None:
                outer.nodes += _nodes() - binding.nodes
            self._remove(binding)
            self.rebind(follow=not failed)
            ending.done = True

    def tally(self, version: int) -> None:
        """Count the forwards that ran in the blocks of a version so far."""
        for binding in self._all:
            if binding.task is None and binding.version == version:
                self._tally(binding)

    # ------------------------------------------------------------------ for the hooks

    def ran_forward(self) -> tuple[int, str, int] | None:
        """Count the microbatch of a forward with gradients; return the arguments of its ``begin_backward``, or None."""
        block = self._innermost_block()
        if block is None:
            return (self._position.newest, "version", self._position.loads) if self._bound.binds_own() else None
        if block.version == SHADOW:
            return None
        if not block.counted:
            block.counted = True
            self._position.count(block.version, 1)
        return (block.version, block.linearise_at, self._position.loads) if self._bound.binds_own() else None

    def begin_backward(self, version: int, linearise_at: str, loads: int) -> None:
        """Bind the module to the version of a forward until the running backward ends.

        Raises:
            RuntimeError: the version is no longer there, or a block binds the module to another version.
        """
        position, block = self._position, self._innermost_block()
        if loads != position.loads:
            raise RuntimeError(
                "this backward belongs to a forward from before the WeightStash was loaded; run that forward again"
            )
        if linearise_at == "version" and not position.oldest <= version <= position.newest:
            raise RuntimeError(
                f"this backward belongs to a forward with version {version}, which has left the ring of versions "
                f"{position.oldest} to {position.newest}; step it earlier, or keep more than {position.versions} "
                "versions"
            )
        if block is not None and block.version not in (version, SHADOW):
            raise RuntimeError(
                f"this backward belongs to a forward with version {version}, but runs inside a block of version "
                f"{block.version}; run it inside `with stash.use({version}):`, or outside any block"
            )
        if block is not None:
            block.ran_backward = True
        task = torch._C._current_graph_task_id()
        binding = next((b for b in self._all if b.task == task), None)
        if binding is None:
            binding = Binding(version, linearise_at, task, waits=block is not None and block.waits)
            # Autograd drops its callbacks at the end of a backward, also when the backward fails.
            ending = Ending(partial(_end, weakref.ref(self), binding))
            torch.autograd.Variable._execution_engine.queue_callback(ending)
            self._all.append(binding)
        binding.version, binding.linearise_at = version, linearise_at
        self.rebind()

    def check_recomputed(self) -> None:
        """Check that a forward that runs again in a backward computes what the first one did.

        Raises:
            RuntimeError: it does not, or the version that it should run with is not known.
        """
        newest = self._position.newest
        if not self._all:
            if newest > 0:
                raise RuntimeError(
                    "a part of the module runs again in a backward, as with torch.utils.checkpoint, but the version to "
                    "run it with is not known; run this backward inside `with stash.use(version):`"
                )
            return
        binding = self._all[-1]
        if binding.linearise_at == "shadow" or (binding.linearise_at == "newest" and binding.version != newest):
            raise RuntimeError(
                f"a part of the module runs again in a backward, as with torch.utils.checkpoint, but "
                f"linearise_at={binding.linearise_at!r} needs the activations of version {binding.version}; "
                'turn checkpointing off, or use linearise_at="version"'
            )
        self.read()

    # ------------------------------------------------------------------ inside

    def _can_wait(self, binding: Binding) -> bool:
        """Return whether a version is decoded, and all that may read it is seen; compiled code is not."""
        old, newest = self._old, self._position.newest
        decoded = old is not None and not old.exact and binding.version != newest and binding.linearise_at == "version"
        return decoded and not self._is_compiled

    def _took_compiled(self) -> bool:
        """Return whether the module ran in compiled code since this was last asked."""
        ran, self.watch.ran_compiled = self.watch.ran_compiled, False
        self._is_compiled |= ran
        return ran

    def _show(self, old: ShortVersions) -> None:
        version = self.shows()
        if version is None:
            old.rest()
        else:
            old.show(version, self._all[-1].weights)

    def _innermost_block(self) -> Binding | None:
        return next((binding for binding in reversed(self._all) if binding.task is None), None)

    def _tally(self, block: Binding) -> None:
        """Count a block as a microbatch if a forward ran in it that no hook has seen."""
        compiled = self._took_compiled()
        unseen = not block.ran_backward and _nodes() > block.nodes
        if not block.counted and (compiled or unseen):
            block.counted = True
            self._position.count(block.version, 1)

    def _remove(self, binding: Binding) -> None:
        self._all = [b for b in self._all if b is not binding]


def _end(bindings: weakref.ref[Bindings], binding: Binding) -> None:
    own = bindings()
    if own is not None:
        own._remove(binding)
        own.rebind(follow=False)
