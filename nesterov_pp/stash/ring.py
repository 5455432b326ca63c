"""The ring of weight versions of one pipeline stage.

[note: why every slot owns its leaf tensors]
Autograd remembers a leaf *object*, not its memory. Repointing ``p.data`` between forward and backward therefore gives
wrong gradients without a word for LayerNorm, RMSNorm, convolutions and elementwise gains. Here each slot holds its own
parameters, and choosing a version means binding the module's ``_parameters`` entries to that slot: no copy, and a
microbatch's forward and backward see the same objects. A slot that is overwritten too early has its version counters
bumped, so autograd raises where it would have used the wrong weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nesterov_pp.stash.bindings import Binding, Bindings
from nesterov_pp.stash.bound import SHADOW, Bound
from nesterov_pp.stash.leaves import check_stashable, gathers_itself, new_leaves
from nesterov_pp.stash.linearise import linearised_elsewhere
from nesterov_pp.stash.position import Position
from nesterov_pp.stash.saved import check_saved
from nesterov_pp.stash.watch import detach

LineariseAt = Literal["version", "newest", "shadow"]
Shadow = Literal["stepped", "linearised"]


class WeightStash:
    """Keeps the ``versions`` newest weight versions of ``module`` in a ring, without ever copying one.

    Version ``v`` lives in slot ``v % versions``. An optimizer built with ``stash=`` reads the newest slot and writes
    the next one, so a step with a stash moves as many bytes as one without.

    Args:
        module: a pipeline stage. Its trainable parameters become slot 0; the other ``versions - 1`` slots are
            allocated here (same shapes, dtypes, devices). Frozen parameters and buffers are shared by all versions;
            parameters tied inside the module stay tied.
        versions: ring length, the delay ``tau`` of the stage plus one; at least 1.
        shadow: one more copy of the weights outside the ring, for an optimizer with a ``prediction``. "stepped": the
            weights that are stepped, while the ring holds predictions. "linearised": the weights that
            ``use(version, linearise_at="shadow")`` differentiates at. Default: none.

    Outside ``use`` the module is bound to the newest version. ``module.parameters()`` gives the leaves of the version
    that is bound. Not safe to use from several threads at once.

    While a backward runs, the module is bound to the version of its forward, for ``torch.utils.checkpoint``, which runs
    parts of the module again then. Parameters may be frozen and unfrozen at any time, from the next version on, and
    replaced by like ones (``load_state_dict(assign=True)``), whose values become those of the newest version.

    Raises:
        ValueError: ``versions`` is below 1, ``shadow`` is something else, or a parameter cannot be kept in a ring: it
            has no values yet (the meta device, lazy modules), shares memory with another one, overlaps itself, or
            carries hooks (register them afterwards, on each of ``parameters(version)``); or ``versions`` is above 1
            and ``fully_shard`` keeps the module's weights.
    """

    def __init__(self, module: nn.Module, versions: int, *, shadow: Shadow | None = None) -> None:
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
                f"fully_shard keeps one version of a module's weights, so a ring of {versions} cannot hold it; use a "
                "method without a stash, such as nesterov-no-stash, or a delay of 0"
            )
        self.versions = versions
        self.shadow = shadow
        self._names = list(named)
        first = list(named.values())
        self._slots = [first] + [new_leaves(first) for _ in range(versions - 1)]
        self._shadows = new_leaves(first) if shadow is not None else []
        with torch.no_grad():
            for leaf, p in zip(self._shadows, first if self._shadows else [], strict=True):
                leaf.copy_(p)
        self._index = {id(leaf): i for slot in self._slots for i, leaf in enumerate(slot)}
        self._position = Position(versions)
        self._bound = Bound(module, self._names, self._slots, self._shadows, self._gathered)
        self._bindings = Bindings(self._position, self._bound)
        self._owner: weakref.ref[Any] | None = None
        weakref.finalize(self, detach, self._bindings.watch.attach(module)).atexit = False

    # ------------------------------------------------------------------ versions

    @property
    def newest(self) -> int:
        """The version that the last step wrote; 0 before the first."""
        return self._position.newest

    @property
    def oldest(self) -> int:
        """The oldest version that the ring still holds."""
        return self._position.oldest

    @property
    def in_use(self) -> int:
        """The version that the module is bound to: that of the innermost ``use`` or backward, else the newest."""
        version = self._bindings.version
        return self.newest if version == SHADOW else version

    @property
    def names(self) -> list[str]:
        """Names of the parameters in the ring, as in ``module.named_parameters()``."""
        return list(self._names)

    def parameters(self, version: int) -> dict[str, nn.Parameter]:
        """The leaf tensors of a version, by name.

        Raises:
            ValueError: the version is not in the ring.
        """
        return dict(zip(self._names, self._slots[self._position.slot_of(version)], strict=True))

    def weights(self) -> dict[str, nn.Parameter]:
        """The weights that are stepped, by name: those of the newest version, unless the ring holds predictions."""
        leaves = self._shadows if self.shadow == "stepped" else self._slots[self._position.newest_slot]
        return dict(zip(self._names, leaves, strict=True))

    def in_flight(self, version: int) -> int:
        """How many microbatches used the version and have not been stepped or released."""
        return self._position.in_flight(version)

    def release(self, version: int) -> None:
        """Give up one microbatch in flight on the version: its gradient will never be stepped.

        Raises:
            ValueError: no microbatch is in flight on it.
        """
        self._position.slot_of(version)
        if self.in_flight(version) < 1:
            raise ValueError(f"version {version} has no microbatch in flight")
        self._position.count(version, -1)

    @contextmanager
    def use(self, version: int, *, linearise_at: LineariseAt = "version") -> Iterator[None]:
        """Run the module with the weights of ``version`` inside the block.

        A block in which the module runs forward with gradients counts as one microbatch in flight until
        ``optimizer.step(version=version)`` takes its gradient, or ``release(version)`` gives it up. One with nothing
        but a backward does not count. Blocks nest.

        Args:
            version: between ``oldest`` and ``newest``.
            linearise_at: where backward differentiates: by default at ``version``. "newest" keeps the activations of
                ``version`` but takes the weights that are newest when backward runs, as a pipeline without a stash
                does: they replace the weights that autograd has saved. "shadow" takes those of
                ``WeightStash(shadow="linearised")`` instead. Weights that an operator saved as a converted copy cannot
                be replaced, so autocast is refused.

        Raises:
            ValueError: the version is not in the ring; weights are to be replaced under autocast; or something was done
                to the module's parameters that the ring cannot follow.
            RuntimeError: (from a backward) a backward inside the block is of a forward with another version; or the
                module is to run again in a backward that takes other weights than those of its forward.
        """
        if linearise_at not in ("version", "newest", "shadow"):
            raise ValueError(f"linearise_at must be 'version', 'newest' or 'shadow', not {linearise_at!r}")
        if linearise_at == "shadow" and self.shadow != "linearised":
            raise ValueError("linearise_at='shadow' needs a WeightStash built with shadow='linearised'")
        self._settle()
        slot = self._position.slot_of(version)
        self._bound.follow(self._position.newest_slot, thorough=True)
        hooks: AbstractContextManager[Any] = nullcontext()
        if linearise_at != "version" and torch.is_grad_enabled():
            hooks = linearised_elsewhere(
                self._slots[slot],
                lambda: self._shadows if linearise_at == "shadow" else self._slots[self._position.newest_slot],
                linearise_at=linearise_at,
                gathered=self._gathered,
            )
        # What runs in a backward runs for the second time.
        counts = torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1
        with self._bindings.block(Binding(version, linearise_at), counts=counts), hooks:
            yield

    def bind(self, version: int, *, linearise_at: LineariseAt = "version") -> AbstractContextManager[None]:
        """Bind the module to a version inside the block, for a backward: ``use`` that never counts as a microbatch.

        Raises:
            ValueError: as ``use``.
        """
        self._settle()
        self._position.slot_of(version)
        self._bound.follow(self._position.newest_slot, thorough=True)
        return self._bindings.block(Binding(version, linearise_at))

    @contextmanager
    def use_stepped(self) -> Iterator[None]:
        """Run the module with ``weights()`` inside the block, without gradients: what a trained model is judged by."""
        if self.shadow != "stepped":
            yield
            return
        self._settle()
        with torch.no_grad(), self._bindings.block(Binding(SHADOW, "version")):
            yield

    def gather_gradients(self, versions: Sequence[int]) -> int:
        """Add the gradients of several versions up on the newest of them, which is returned, with what is in flight.

        For updates whose microbatches ran with different versions. The other versions have no gradients then.

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
            ValueError: another optimizer does.
        """
        if self._owner is not None and self._owner() not in (None, optimizer):
            raise ValueError(
                "this WeightStash already has an optimizer; a ring is written by one optimizer only, "
                "so give all its parameters (as parameter groups, if they differ) to that one"
            )
        self._owner = weakref.ref(optimizer)

    def leaves(self, parameters: Sequence[Tensor], *, complete: bool = True) -> list[list[Tensor]]:
        """The ring as lists over ``parameters``, one list a slot. ``parameters`` may be leaves of any version.

        Raises:
            ValueError: one of ``parameters`` is not in the ring; or, if ``complete``, they are not all that are.
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

    def shadows_of(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The copies outside the ring of ``parameters``, which may be leaves of any version."""
        return [self._shadows[self._index[id(p)]] for p in parameters]

    def begin_step(self, version: int | None, microbatches: int) -> tuple[int, int, int]:
        """Check a step that takes the gradients of ``version``; returns its slots (gradients, source, target).

        ``None`` stands for the newest version, where that is not ambiguous. Takes over what was done to the module's
        parameters; changes nothing else.

        Raises:
            ValueError: the version is not in the ring; the step would overwrite a version that other microbatches in
                flight need; no version was named while only an older one has gradients; or something was done to the
                module's parameters that the ring cannot follow.
        """
        self._settle()
        self._bound.follow(self._position.newest_slot)
        if version is None:
            version = self._implied_version()
        grads_of = self._position.slot_of(version)
        self._bindings.tally(version)
        self._position.check_step(version, microbatches)
        self._bound.drop_frozen_gradients(grads_of)
        self._position.begin_step()
        return grads_of, self._position.newest_slot, (self.newest + 1) % self.versions

    def end_step(self, version: int | None, microbatches: int) -> None:
        """Count the step that ``begin_step`` checked: its gradients are taken, and the next version is the newest.

        Whatever cuts this call short, the same call finishes it; once it is finished, it does nothing.
        """
        self._position.end_step(version, microbatches)
        self._settle()

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Every live version: ``{"newest": int, "weights": [{name: tensor}, ...]}``, oldest first, without copies.

        Where there are weights outside the ring, they are under ``"shadow"``.

        Raises:
            ValueError: something was done to the module's parameters that the ring cannot follow.
        """
        self._settle()
        self._bound.follow(self._position.newest_slot, thorough=True)
        live = range(self.oldest, self.newest + 1)
        state: dict[str, Any] = {
            "newest": self.newest,
            "weights": [{n: p.detach() for n, p in self.parameters(v).items()} for v in live],
        }
        if self.shadow is not None:
            state["shadow"] = {n: p.detach() for n, p in zip(self._names, self._shadows, strict=True)}
        return state

    def check(self, state: dict[str, Any]) -> tuple[int, list[dict[str, Tensor]], dict[str, Tensor] | None]:
        """The parts of a state that ``load_state_dict`` would take: newest version, weights, oldest first, and those
        outside the ring.

        Raises:
            ValueError: ``load_state_dict`` would refuse it.
        """
        self._settle()
        self._bound.follow(self._position.newest_slot, thorough=True)
        like = dict(zip(self._names, self._slots[0], strict=True))
        return check_saved(state, like, self.versions, has_shadow=self.shadow is not None)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore every live version. No microbatch is in flight afterwards: their forwards have to be run again.

        Raises:
            ValueError: the state is of a ring of another length or of other parameters, or something was done to the
                module's parameters that the ring cannot follow; nothing is changed.
        """
        newest, weights, shadow = self.check(state)
        self._position.load(newest)
        for version, saved in enumerate(weights, start=self.oldest):
            self._bound.tell(version % self.versions)
            for name, leaf in self.parameters(version).items():
                leaf.copy_(saved[name])
                leaf.grad = None
        if shadow is not None:
            for name, leaf in zip(self._names, self._shadows, strict=True):
                leaf.copy_(shadow[name])
        self._bindings.rebind()

    # ------------------------------------------------------------------ inside

    def _implied_version(self) -> int:
        def has_gradient(version: int) -> bool:
            return any(leaf.grad is not None for leaf in self._slots[version % self.versions])

        older = [v for v in range(self.oldest, self.newest) if has_gradient(v)]
        if older:
            raise ValueError(
                f"gradients are waiting on version {older[0]}, not only on the newest ({self.newest}); "
                f"say which to take: step(version={older[0]})"
            )
        return self.newest

    def _settle(self) -> None:
        """Do what follows from the last step, where that has not been done."""
        if not self._position.to_clear:
            return
        for slot in self._position.to_clear:
            for leaf in self._slots[slot]:
                leaf.grad = None
        self._bound.tell(self._position.newest_slot)
        self._bindings.rebind()
        self._position.cleared()
