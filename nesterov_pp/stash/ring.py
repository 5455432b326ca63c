"""The ring of weight versions of one pipeline stage.

[note: why every slot owns its leaf tensors]
Autograd remembers a leaf *object*, not its memory. Repointing ``p.data`` between forward and backward therefore gives
silently wrong gradients for LayerNorm, RMSNorm, convolutions and elementwise gains. Here each slot holds its own
parameters, and choosing a version means binding the module's ``_parameters`` entries to that slot: nothing is copied,
and a microbatch's forward and backward see the same objects. Overwriting a slot too early bumps its version counters,
so autograd raises an error where it would have used the wrong weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nesterov_pp.stash.bindings import Binding, Bindings
from nesterov_pp.stash.bound import SHADOW, Bound
from nesterov_pp.stash.forms import OldVersions, check_form, is_short
from nesterov_pp.stash.leaves import aliases, check_stashable, gathers_itself, new_leaves
from nesterov_pp.stash.linearise import check_linearisable, saved_elsewhere
from nesterov_pp.stash.module_state import Pair, PartState
from nesterov_pp.stash.old_versions import ShortVersions
from nesterov_pp.stash.position import Position
from nesterov_pp.stash.saved import SavedRing, check_saved
from nesterov_pp.stash.watch import detach

LineariseAt = Literal["version", "newest", "shadow"]
Shadow = Literal["stepped", "linearised"]


class WeightStash:
    """A ring of the ``versions`` newest weight versions of ``module``, which never copies a version.

    Version ``v`` lives in slot ``v % versions`` (see ``slot_of``). An optimizer built with ``stash=`` reads the newest
    slot and writes the next one, so a step with a stash moves as many bytes as one without.

    Args:
        module: a pipeline stage. Its trainable parameters become slot 0; the other ``versions - 1`` slots are
            allocated here, with the same shapes, dtypes and devices. Frozen parameters and buffers are shared by all
            versions; parameters tied inside the module stay tied.
        versions: length of the ring: the delay ``tau`` of the stage plus one; at least 1.
        shadow: one more copy of the weights, kept outside the ring, for an optimizer with a ``prediction``. "stepped":
            the weights that are stepped, while the ring holds predicted weights. "linearised": the weights at which
            ``use(version, linearise_at="shadow")`` differentiates. Default: None, no such copy.
        old_versions: how the versions older than the newest are kept. "full" (default): as they are.
            "8bit-differences": each as its difference to the next version, an int8 code for each weight and a bfloat16
            scale for 32 of them, 1.0625 bytes a weight; for weights of float32, bfloat16 and float16. "bfloat16":
            rounded, 2 bytes a weight; for weights of float32 (and bfloat16, which lose nothing). docs/memory.md has
            the errors of both. One version is kept in full, the newest: backward decodes the weights that it saved one
            at a time, and a step of these optimizers writes the next version over the gradients that it takes, before
            it clears them. Weights of an older version can be read inside ``use`` and ``bind``, and after ``show``;
            that takes the memory of a second version from then on. With differences, what is written to the newest
            version outside of a step moves the older versions as well.
        exact_forward: also keep every version in full, for forwards that run late in an emulation of a pipeline.
            Backward uses the decoded weights all the same (default: False).

    Outside ``use``, the module is bound to the newest version. ``module.parameters()`` returns the leaves of the bound
    version. With a "stepped" shadow, these are predictions; ``state_dict()`` of the module and its parts
    returns the stepped weights instead (outside ``use``), ``load_state_dict`` sets both, and the module keeps the
    stepped weights when the stash is gone. A copy of the module has the weights of ``parameters()``. A stash must not
    be used from several threads at once.

    While a backward runs, the module is bound to the version of its forward, because ``torch.utils.checkpoint`` runs
    parts of the module again then. Parameters may be frozen and unfrozen at any time, with effect from the next version
    on. They may also be replaced by parameters of the same dtype, device and shape (``load_state_dict(assign=True)``),
    whose values become those of the newest version.

    Raises:
        ValueError: ``versions`` is below 1; ``shadow`` is not one of the above; a parameter cannot be kept in a ring,
            because it has no values yet (meta device, lazy modules), shares memory with another one, overlaps itself,
            or carries hooks (register them afterwards, on each of ``parameters(version)``); ``versions`` is above 1
            and ``fully_shard`` keeps the module's weights; or ``old_versions`` is unknown or cannot keep a parameter.
    """

    def __init__(
        self,
        module: nn.Module,
        versions: int,
        *,
        shadow: Shadow | None = None,
        old_versions: OldVersions = "full",
        exact_forward: bool = False,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise ValueError(f"a WeightStash takes a torch.nn.Module, not {type(module).__name__}")
        if not isinstance(versions, int) or versions < 1:
            raise ValueError(f"versions must be at least 1 (the delay plus one), a whole number, not {versions!r}")
        if shadow not in (None, "stepped", "linearised"):
            raise ValueError(f"shadow must be 'stepped', 'linearised' or None, not {shadow!r}")
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        check_stashable(named)
        self._gathered = gathers_itself(module)
        if self._gathered and versions > 1:
            raise ValueError(
                f"fully_shard keeps one version of a module's weights, so a ring of {versions} versions is not "
                "possible; use a method without a stash, such as nesterov-no-stash, or a delay of 0"
            )
        check_form(old_versions, named)
        self.versions = versions
        self.shadow = shadow
        self.old_versions = old_versions
        self._names = list(named)
        first = list(named.values())
        short = is_short(old_versions, versions) and bool(first)
        # A short ring that also has all versions in full has one more memory, which older versions are decoded into.
        self._owning = versions if not short else versions + 1 if exact_forward else 1
        self._slots = [first] + [new_leaves(first) for _ in range(self._owning - 1)]
        self._memory: list[list[Tensor]] = [list(slot) for slot in self._slots]
        if short:
            self._memory = [[leaf.detach() for leaf in slot] for slot in self._slots]
        while short and (len(self._slots) < versions or len(self._slots) % self._owning):
            self._slots.append(aliases(self._slots[len(self._slots) % self._owning]))
        self._shadows = new_leaves(first) if shadow is not None else []
        with torch.no_grad():
            for leaf, p in zip(self._shadows, first if self._shadows else [], strict=True):
                leaf.copy_(p)
        self._index = {id(leaf): i for slot in self._slots for i, leaf in enumerate(slot)}
        self._position = Position(versions, len(self._slots))
        self._old = (
            ShortVersions(old_versions, self._position, self._names, self._slots, self._memory) if short else None
        )
        self._bound = Bound(module, self._names, self._slots, self._shadows, self._gathered)
        self._bindings = Bindings(self._position, self._bound, self._old)
        self._owner: weakref.ref[Any] | None = None
        handles = self._bindings.watch.attach(module)
        if shadow is not None:
            for part, own in self._bound.parts():
                handles += PartState(weakref.WeakMethod(self._exchanged), own).attach(part, stepped=shadow == "stepped")
        left = self._bound if shadow == "stepped" else None
        weakref.finalize(self, _end, handles, left).atexit = False

    # ------------------------------------------------------------------ versions

    @property
    def newest(self) -> int:
        """The version that the last step wrote; 0 before the first step."""
        return self._position.newest

    @property
    def oldest(self) -> int:
        """The oldest version that the ring still holds."""
        return self._position.oldest

    @property
    def in_use(self) -> int:
        """The version that the module is bound to: that of the innermost ``use`` or backward, or else the newest."""
        version = self._bindings.version
        return self.newest if version == SHADOW else version

    @property
    def names(self) -> list[str]:
        """The names of the parameters in the ring, as in ``module.named_parameters()``."""
        return list(self._names)

    @property
    def keeps_exactly(self) -> bool:
        """Whether every version of the ring can be used in a forward as it was."""
        return self._old is None or self._old.exact

    @property
    def nbytes(self) -> int:
        """The bytes of all that the ring keeps besides the newest version: the older ones, a shadow, a buffer."""
        one = sum(p.nbytes for p in self._slots[0])
        others = self._owning - 1 + (self.shadow is not None)
        return others * one + (0 if self._old is None else self._old.nbytes)

    def slot_of(self, version: int) -> int:
        """Return the slot of a version, a place in what ``leaves`` returns.

        Raises:
            ValueError: the version is not in the ring.
        """
        return self._position.slot_of(version)

    def parameters(self, version: int) -> dict[str, nn.Parameter]:
        """Return the leaf tensors of a version, by name. Their gradients are always those of the version.

        With ``old_versions`` other than "full", the values of an older version are there after ``show`` only.

        Raises:
            ValueError: the version is not in the ring.
        """
        return dict(zip(self._names, self._slots[self._position.slot_of(version)], strict=True))

    def show(self, version: int) -> None:
        """Make the values of a version readable in its leaves, until the next block, backward or step.

        With ``old_versions="full"``, those of all versions always are.

        Raises:
            ValueError: the version is not in the ring, or the module is bound to another older one, whose values would
                be lost.
        """
        self._settle()
        self._position.slot_of(version)
        if self._old is None or version == self.newest:
            return
        if self._old.exact:
            self._bindings.rest()
            return
        shows = self._bindings.shows()
        if shows is not None and shows != version:
            raise ValueError(f"version {version} cannot be shown while the module computes with version {shows}")
        self._old.show(version)

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the stepped weights, by name: the newest version, or the shadow if the ring holds predictions."""
        leaves = self._shadows if self.shadow == "stepped" else self._slots[self._position.newest_slot]
        return dict(zip(self._names, leaves, strict=True))

    def in_flight(self, version: int) -> int:
        """Return how many microbatches used the version and have not been stepped or released."""
        return self._position.in_flight(version)

    def release(self, version: int) -> None:
        """Give up one microbatch in flight on the version, whose gradient will never be stepped.

        Raises:
            ValueError: the version is not in the ring, or no microbatch is in flight on it.
        """
        self._position.slot_of(version)
        if self.in_flight(version) < 1:
            raise ValueError(f"version {version} has no microbatch in flight")
        self._position.count(version, -1)

    @contextmanager
    def use(
        self, version: int, *, linearise_at: LineariseAt = "version", weights: Mapping[str, Tensor] | None = None
    ) -> Iterator[None]:
        """Run the module with the weights of ``version`` inside the block.

        A block in which the module runs forward with gradients counts as one microbatch in flight until
        ``optimizer.step(version=version)`` takes its gradient, or ``release(version)`` gives it up. A block
        that only runs a backward does not count. Blocks can be nested.

        Args:
            version: version between ``oldest`` and ``newest``.
            weights: the weights of an older version as they were, by name, for a forward that runs again after a
                restart in a ring that has kept them in a short form (default: as the ring has them).
            linearise_at: the weights at which backward differentiates. "version" (default): those of ``version``.
                "newest": the activations are those of ``version``, but the weights are those that are newest when
                backward runs, as in a pipeline without a stash; they replace the weights that autograd has saved.
                "shadow": as "newest", but with the shadow of ``WeightStash(shadow="linearised")``. Weights that an
                operator saved as a converted copy cannot be replaced, so autocast is refused.

        Raises:
            ValueError: the version is not in the ring; weights would have to be replaced under autocast; or the
                module's parameters were changed in a way that the ring cannot follow.
            RuntimeError: (from a backward) a backward inside the block belongs to a forward with another version; or
                the module has to run again in a backward that uses other weights than those of its forward.
        """
        if linearise_at not in ("version", "newest", "shadow"):
            raise ValueError(f"linearise_at must be 'version', 'newest' or 'shadow', not {linearise_at!r}")
        if linearise_at == "shadow" and self.shadow != "linearised":
            raise ValueError("linearise_at='shadow' needs a WeightStash built with shadow='linearised'")
        self._settle()
        slot = self._position.slot_of(version)
        self._follow(thorough=True)
        hooks: AbstractContextManager[Any] = nullcontext()
        if torch.is_grad_enabled() and (linearise_at != "version" or self._old is not None):
            if linearise_at != "version":
                check_linearisable(self._slots[slot], linearise_at, self._gathered)
            places = [self._slots[slot]] if self._old is None else self._old.places(version)
            hooks = saved_elsewhere(places, self._for_backward(version, linearise_at))
        # A forward inside a backward runs for the second time.
        counts = torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1
        with self._bindings.block(Binding(version, linearise_at, weights=weights), counts=counts), hooks:
            yield

    def bind(self, version: int, *, linearise_at: LineariseAt = "version") -> AbstractContextManager[None]:
        """Bind the module to a version inside the block, for a backward; unlike ``use``, never count a microbatch.

        With ``old_versions`` other than "full", an older version is decoded as a whole once a torch function or a part
        of the module reads weights of it.

        Raises:
            ValueError: as for ``use``.
        """
        self._settle()
        self._position.slot_of(version)
        self._follow(thorough=True)
        return self._bindings.block(Binding(version, linearise_at, backward=True, waits=True))

    @contextmanager
    def use_stepped(self) -> Iterator[None]:
        """Run the module with ``weights()`` inside the block, to evaluate it.

        Gradients are disabled if these weights are the shadow.
        """
        if self.shadow != "stepped":
            yield
            return
        self._settle()
        with torch.no_grad(), self._bindings.block(Binding(SHADOW, "version")):
            yield

    def gather_gradients(self, versions: Sequence[int]) -> int:
        """Add up the gradients and the microbatches in flight of several versions on the newest of them; return it.

        For updates whose microbatches ran with different versions. The other versions have no gradients afterwards, and
        parameters that have been frozen since have none either.

        Raises:
            ValueError: one of the versions is not in the ring.
        """
        slots = {version: self._slots[self._position.slot_of(version)] for version in sorted(set(versions))}
        newest = max(slots)
        for version, leaves in slots.items():
            if version == newest:
                continue
            for leaf, onto in zip(leaves, slots[newest], strict=True):
                if leaf.grad is not None:
                    onto.grad = leaf.grad if onto.grad is None else onto.grad.add_(leaf.grad)
                leaf.grad = None
        self._bound.drop_frozen_gradients(self._position.slot_of(newest))
        self._position.move([version for version in slots if version != newest], newest)
        return newest

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of every version."""
        for slot in self._slots:
            for leaf in slot:
                if set_to_none:
                    leaf.grad = None
                elif leaf.grad is not None:
                    leaf.grad = torch.zeros_like(leaf.grad)

    # ------------------------------------------------------------------ for the optimizer

    def attach(self, optimizer: object) -> None:
        """Make ``optimizer`` the one that writes this ring.

        Raises:
            ValueError: another optimizer already writes it.
        """
        if self._owner is not None and self._owner() not in (None, optimizer):
            raise ValueError(
                "this WeightStash already has an optimizer; a ring is written by one optimizer only, "
                "so give all its parameters (as parameter groups, if they differ) to that one"
            )
        self._owner = weakref.ref(optimizer)

    def leaves(self, parameters: Sequence[Tensor], *, complete: bool = True) -> list[list[Tensor]]:
        """Return the leaves of every slot in the order of ``parameters``, which may be leaves of any version.

        Raises:
            ValueError: one of ``parameters`` is not in the ring, or ``complete`` is set and one of the ring is missing.
        """
        order = [self._index.get(id(p), -1) for p in parameters]
        if -1 in order:
            shape = tuple(parameters[order.index(-1)].shape)
            raise ValueError(
                f"a parameter of shape {shape} is not in the WeightStash; build the stash on the module first, "
                "then the optimizer on the same module's trainable parameters"
            )
        missing = sorted(set(range(len(self._names))) - set(order))
        if complete and missing:
            raise ValueError(
                f"the optimizer of a WeightStash must step all its parameters; {self._names[missing[0]]} is missing"
            )
        return [[slot[i] for i in order] for slot in self._slots]

    def memory(self, parameters: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return tensors with the memory of the slots, in the order of ``parameters``; slot s has list s modulo n."""
        return [[part[self._index[id(p)]] for p in parameters] for part in self._memory]

    def shadows_of(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the shadows of ``parameters``, which may be leaves of any version."""
        return [self._shadows[self._index[id(p)]] for p in parameters]

    def begin_step(
        self, version: int | None, microbatches: int, *, over_gradients: bool = False
    ) -> tuple[int, int, int]:
        """Check a step that takes the gradients of ``version``; return its slots (gradients, source, target).

        The weights of all three can be read. ``None`` stands for the newest version, unless that is ambiguous. Takes
        over changes made to the module's parameters; changes nothing else.

        Args:
            version: the version whose gradients are taken.
            microbatches: how many microbatches are in them.
            over_gradients: the step reads each element of a gradient before it writes that of the next weights, and
                does not read the weights of ``version``. Then the leaves of the target may lie in the memory of the
                gradients. ``drop_step`` lets go of it if the step is not run.

        Raises:
            ValueError: the version is not in the ring; the step would overwrite a version that other microbatches in
                flight need; no version was named, but an older one has gradients; or the module's parameters were
                changed in a way that the ring cannot follow.
        """
        self._settle()
        self._follow()
        if version is None:
            version = self._implied_version()
        grads_of = self._position.slot_of(version)
        self._bindings.tally(version)
        self._position.check_step(version, microbatches)
        self._bound.drop_frozen_gradients(grads_of)
        if self._old is not None:
            self._old.begin_step(version, over_gradients=over_gradients)
        self._position.begin_step()
        return grads_of, self._position.newest_slot, (self.newest + 1) % self._position.slots

    def end_step(self, version: int | None, microbatches: int) -> None:
        """Count the step that ``begin_step`` checked: its gradients are taken, and the next version is the newest.

        If this call is interrupted, the same call finishes it; once finished, it does nothing.
        """
        self._position.end_step(version, microbatches)
        self._settle()

    def drop_step(self, *, half_way: bool = False) -> None:
        """Let go of what ``begin_step`` prepared, if the step has not been counted.

        ``half_way``: the step failed while it wrote; then its gradients are gone if they could be written over.
        """
        if self._old is not None:
            if half_way:
                self._old.spoil_step()
            self._old.drop_step()

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return every live version, ``{"newest": int, "weights": [{name: tensor}, ...]}``, oldest first, not copied.

        Weights outside the ring, if there are any, are under ``"shadow"``; the names of parameters that do not require
        gradients in each version, if there are any, are under ``"frozen"``. If older versions are kept in another form,
        ``"weights"`` holds the newest only (all, with ``exact_forward``), and the others are under ``"older"``, in the
        form named by ``"old_versions"``.

        Raises:
            ValueError: the module's parameters were changed in a way that the ring cannot follow.
        """
        self._settle()
        self._follow(thorough=True)
        self._bindings.rest()
        live = range(self.oldest, self.newest + 1)
        in_full = live if self._old is None or self._old.exact else [self.newest]
        state: dict[str, Any] = {
            "newest": self.newest,
            "weights": [{n: p.detach() for n, p in self.parameters(v).items()} for v in in_full],
        }
        if self._old is not None:
            state |= {"old_versions": self._old.form, "older": self._old.saved()}
        if self.shadow is not None:
            state["shadow"] = {n: p.detach() for n, p in zip(self._names, self._shadows, strict=True)}
        frozen = [self._bound.frozen(self._position.slot_of(v)) for v in live]
        return {**state, "frozen": frozen} if any(frozen) else state

    def check(self, state: dict[str, Any]) -> SavedRing:
        """Check a state for ``load_state_dict``, and return it.

        Raises:
            ValueError: ``load_state_dict`` would refuse the state.
        """
        self._settle()
        self._follow(thorough=True)
        like = dict(zip(self._names, self._slots[0], strict=True))
        return check_saved(state, like, self.versions, has_shadow=self.shadow is not None)

    @torch.no_grad()
    def load_state_dict(
        self, state: dict[str, Any], *, exactly: Mapping[int, Mapping[str, Tensor]] | None = None
    ) -> None:
        """Restore every live version. No microbatch is in flight afterwards: their forwards have to be run again.

        Parameters that were frozen when the state was saved are frozen, and those that are frozen now stay so. Older
        versions that were kept in another form are converted to that of this ring.

        Args:
            state: what ``state_dict`` returned.
            exactly: older versions as they were, of which the state may have only a short form.

        Raises:
            ValueError: the state is of a ring of another length or of other parameters, or the module's parameters
                were changed in a way that the ring cannot follow; nothing is changed.
        """
        saved = self.check(state)
        self._bindings.rest()
        self._position.load(saved.newest)
        resting = {name for name, trains in zip(self._names, self._bound.trained, strict=True) if not trains}
        for version, names in zip(range(self.oldest, saved.newest + 1), saved.frozen, strict=True):
            self._bound.freeze(self._position.slot_of(version), resting | set(names))
            for leaf in self._slots[self._position.slot_of(version)]:
                leaf.grad = None
        live = range(self.oldest, saved.newest + 1)
        if self._old is not None and saved.fits(self._old.form, self._slots[0]):
            self._old.load(saved.older)
        elif self._old is not None:
            self._old.load_in_full([list(weights.values()) for weights in saved.in_full()])
        in_full = {saved.newest: saved.newest_weights}
        if self._old is None or self._old.exact:
            in_full = {
                v: {**weights, **(exactly or {}).get(v, {})} for v, weights in zip(live, saved.in_full(), strict=True)
            }
        for version, weights in in_full.items():
            for name, leaf in self.parameters(version).items():
                leaf.copy_(weights[name])
        if saved.shadow is not None:
            for name, leaf in zip(self._names, self._shadows, strict=True):
                leaf.copy_(saved.shadow[name])
        self._bindings.rebind()

    # ------------------------------------------------------------------ inside

    def _follow(self, *, thorough: bool = False) -> None:
        self._bound.follow(self._position.newest_slot, thorough=thorough)
        if self._old is not None:
            self._old.follow()

    def _for_backward(self, version: int, linearise_at: LineariseAt) -> Callable[[int], Tensor]:
        """Return a function that returns a weight, by its number, at which the backward of a forward differentiates."""
        loads = self._position.loads

        def weight(number: int) -> Tensor:
            if linearise_at == "shadow":
                return self._shadows[number]
            if linearise_at == "newest" or self._old is None:
                return self._slots[self._position.newest_slot][number]
            if loads != self._position.loads:
                raise RuntimeError(
                    "this backward belongs to a forward from before the WeightStash was loaded; run that forward again"
                )
            self._settle()
            return self._old.weight(version, number)

        return weight

    def _exchanged(self, follow: bool) -> Pair | None:
        """Return the newest leaves and the shadows; None while the module is bound to other weights."""
        self._settle()
        if not self._bindings.is_newest:
            return None
        if follow:
            self._follow()
        return self._slots[self._position.newest_slot], self._shadows

    def _implied_version(self) -> int:
        def has_gradient(version: int) -> bool:
            return any(leaf.grad is not None for leaf in self._slots[self._position.slot_of(version)])

        older = [v for v in range(self.oldest, self.newest) if has_gradient(v)]
        if older:
            raise ValueError(
                f"gradients are waiting on version {older[0]}, which is older than the newest ({self.newest}); "
                f"say which to take: step(version={older[0]})"
            )
        return self.newest

    def _settle(self) -> None:
        """Clear gradients and bind the module after the last step, if that has not been done."""
        if not self._position.to_clear:
            return
        for slot in self._position.to_clear:
            for leaf in self._slots[slot]:
                leaf.grad = None
        self._bound.tell(self._position.newest_slot)
        self._bound.rest(self._position.newest_slot, ring_predicts=self.shadow == "stepped")
        if self._old is not None:
            self._old.keep()
        self._bindings.rebind()
        self._position.cleared()


def _end(handles: Iterable[Any], bound: Bound | None) -> None:
    """Remove the hooks of a ring that is gone; with ``bound``, leave the stepped weights in its module."""
    detach(handles)
    if bound is not None:
        bound.leave_shadows()
