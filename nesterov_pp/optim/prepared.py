"""Parameters and their state, in the form that the pass takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from nesterov_pp.kernels import Normaliser, StepClass, StepSlots, Tensors, choose_backend, extension, make_plan
from nesterov_pp.kernels.raw import answers_for_itself, has_memory, is_subclass, why_not_raw
from nesterov_pp.optim import counts, saved_state
from nesterov_pp.optim.coded import RESIDUAL, SCALE_OF, is_coded, local_scales
from nesterov_pp.optim.device_counts import DeviceCounts
from nesterov_pp.optim.fresh import MasterWeights, fresh_residual, masters_of
from nesterov_pp.optim.local import is_dtensor, is_plain, is_resolved, local, local_gradient, materialised, write_back
from nesterov_pp.optim.options import Options


class Prepared:
    """The parameters that have state, prepared for the pass; valid until one of them or of their state is replaced.

    ``entries`` are the names of the entries in every parameter's state, ``only_reference`` is an option that only the
    reference backend supports, and ``small`` one that only backends with small formats do. Masters, residuals and
    AMSGrad's state are added where they are missing. ``leaves[s]`` are the parameters in ring slot ``s`` (one slot if
    there is no ring). With ``count_on_device``, ``device_counts`` holds the counts.

    Raises:
        ValueError: state is missing, or the requested backend cannot step these parameters.
    """

    @torch.no_grad()
    def __init__(
        self,
        groups: list[dict[str, Any]],
        state: dict[Any, dict[str, Any]],
        options: Options,
        entries: list[str],
        normaliser: Normaliser,
        only_reference: str | None,
        count_on_device: bool = False,
    ) -> None:
        names, numbers, group_of, parameters = [], [], [], []
        number, seen = 0, set()
        for k, group in enumerate(groups):
            labels = group.get("param_names") or []
            for i, p in enumerate(group["params"]):
                number += 1
                if not state.get(p) or id(p) in seen:
                    continue
                seen.add(id(p))
                label = labels[i] if i < len(labels) else f"parameter {i}"
                names.append(label if len(groups) == 1 else f"{label} of group {k}")
                numbers.append(number - 1)
                group_of.append(k)
                parameters.append(p)
        states = [state[p] for p in parameters]
        _resolve(states)
        saved_state.check_entries(names, states, entries)
        for group in groups:
            options.of_group(group)  # a loaded group may have brought an option that does not go with its format
        stash = options.stash
        self.leaves = stash.leaves(parameters) if stash is not None else [parameters]
        self._plain = [[local(p) for p in slot] for slot in self.leaves]
        self._names = names
        self._special = [i for i, p in enumerate(parameters) if not is_plain(p)]
        self._resolved = [i for i in self._special if any(is_resolved(slot[i]) for slot in self.leaves)]
        self.sharded = any(map(is_dtensor, parameters))
        self._options = (only_reference, count_on_device)
        memory = self._plain if stash is None else [list(map(local, part)) for part in stash.memory(parameters)]
        tensors_to_step = list(chain.from_iterable(memory))
        odd = only_reference or _odd_state(names, states)
        self.backend = choose_backend(options.backend, tensors_to_step, odd)
        swapped = stash is not None and stash.shadow == "stepped"
        shadows = stash.shadows_of(parameters) if stash is not None and stash.shadow else []
        newest = self.leaves[stash.slot_of(stash.newest)] if stash is not None else parameters
        stepped = shadows if swapped else newest
        masters = masters_of(states, stepped, options)
        self.masters = MasterWeights([shadows] * len(self.leaves) if swapped else self.leaves, masters)
        residuals = [
            s.get(RESIDUAL, fresh_residual(p)) if options.has_residual(p) else None
            for s, p in zip(states, parameters, strict=True)
        ]
        largest = [_largest(s) if groups[k].get("amsgrad") else None for s, k in zip(states, group_of, strict=True)]
        self.device_counts = _counts_on_device(group_of, states, entries) if count_on_device and states else None
        on_host = self.device_counts is None
        tensors = Tensors(
            names=names,
            numbers=numbers,
            groups=group_of,
            slots=self._plain,
            exp_avgs=[local(s["exp_avg"]) for s in states],
            exp_avg_sqs=[local(s["exp_avg_sq"]) for s in states] if "exp_avg_sq" in entries else [],
            masters=[None if master is None else local(master) for master in masters],
            steps=[s["step"] for s in states] if on_host else [],
            mu_products=[s["mu_product"] for s in states] if on_host and "mu_product" in entries else [],
            max_exp_avg_sqs=[None if v is None else local(v) for v in largest],
            normaliser=normaliser,
            kind=options.kind,
            means=[] if options.mean_name is None else [local(s[options.mean_name]) for s in states],
            shadows=[local(p) for p in shadows],
            ring_predicts=swapped,
            exp_avg_scales=_scales(parameters, states, "exp_avg"),
            exp_avg_sq_scales=_scales(parameters, states, "exp_avg_sq"),
            residuals=[None if r is None else local(r) for r in residuals]
            if any(map(options.has_residual, parameters))
            else [],
            code_seed=options.seed,
        )
        self.plan = make_plan(self.backend, tensors, options.seed if options.stochastic_rounding else None)
        # Only now that all memory has been allocated, which may fail.
        for s, master, residual, most in zip(states, masters, residuals, largest, strict=True):
            added = {"master_weight": master, RESIDUAL: residual, "max_exp_avg_sq": most}
            s.update({name: value for name, value in added.items() if value is not None})
        self.repeats = _repeats(groups)
        self._stateless = [p for group in groups for p in group["params"] if not state.get(p)]
        self._snapshot = Snapshot(groups, state, list(chain.from_iterable(self.leaves)))

    def holds(
        self,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        only_reference: str | None,
        count_on_device: bool = False,
    ) -> bool:
        """Return whether nothing was replaced and no parameter without state has received a gradient."""
        return (
            self._snapshot.holds(groups, state)
            and (only_reference, count_on_device) == self._options
            and all(p.grad is None for p in self._stateless)
        )

    def stepped(self, grads_of: int) -> list[bool]:
        """Return which parameters have a gradient in a slot."""
        return [p.grad is not None for p in self.leaves[grads_of]]

    def collect(self, slots: StepSlots) -> list[StepClass]:
        """Run ``Plan.collect`` while the plain tensors carry the gradients of the parameters they stand for."""
        for slot in {slots.grads, slots.source}:
            for i in self._resolved:
                self._plain[slot][i].copy_(local(self.leaves[slot][i]))
        with self._plain_gradients(slots.grads, self._special):
            try:
                return self.plan.collect(slots)
            except ValueError:
                odd = self._odd_gradients(slots.grads)
                if not odd:
                    raise
        with self._plain_gradients(slots.grads, self._special + odd):
            return self.plan.collect(slots)

    def written(self, target: int) -> None:
        """Note that a slot was written, and write copies back to the parameters they stand for."""
        for i in self._resolved:
            write_back(self.leaves[target][i], self._plain[target][i])
        self.masters.written(target)

    def _odd_gradients(self, slot: int) -> list[int]:
        """Return the plain parameters whose gradients have their elements where only their own operators find them."""

        def is_odd(p: Tensor) -> bool:
            return p.grad is not None and answers_for_itself(p.grad) and why_not_raw(p) is None

        special = set(self._special)
        return [i for i, p in enumerate(self.leaves[slot]) if i not in special and is_odd(p)]

    @contextmanager
    def _plain_gradients(self, slot: int, numbers: list[int]) -> Iterator[None]:
        """Put plain gradients of some parameters where the plan looks for them, inside the block only."""
        plain, leaves = self._plain[slot], self.leaves[slot]
        own = [plain[i].grad for i in numbers]
        try:
            for i in numbers:
                grad = leaves[i].grad
                if grad is not None and is_plain(leaves[i]):
                    plain[i].grad = materialised(grad, leaves[i].detach(), self._names[i])
                else:
                    plain[i].grad = local_gradient(leaves[i])
            yield
        finally:
            for i, grad in zip(numbers, own, strict=True):
                plain[i].grad = grad


def _repeats(groups: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return groups of the parameters that a group has a second time, then a third time, and so on.

    torch warns about such parameters and steps them that many times, one step after the other.
    """
    rounds: list[list[dict[str, Any]]] = []
    for k, group in enumerate(groups):
        if len({id(p) for p in group["params"]}) == len(group["params"]):
            continue
        seen: Counter[int] = Counter()
        for p in group["params"]:
            time = seen[id(p)]
            seen[id(p)] += 1
            if time > len(rounds):  # all groups, so that each keeps its index and thus its hyper-parameters
                rounds.append([{**g, "params": [], "param_names": None} for g in groups])
            if time > 0:
                rounds[time - 1][k]["params"].append(p)
    return rounds


def _resolve(states: list[dict[str, Any]]) -> None:
    """Resolve state that is negated or conjugated lazily, so that its values lie in memory from here on."""
    for entries in states:
        for name, value in entries.items():
            if isinstance(value, Tensor) and is_resolved(value) and has_memory(value):
                entries[name] = value.resolve_conj().resolve_neg()


def _odd_state(names: list[str], states: list[dict[str, Any]]) -> str | None:
    """Return a description of state that only torch's own operators can step, or None."""
    for name, entries in zip(names, states, strict=True):
        for entry, value in entries.items():
            if isinstance(value, Tensor) and is_subclass(value) and not is_dtensor(value):
                return f"a {type(value).__name__} as {entry!r} of {name}"
    return None


def _counts_on_device(groups: list[int], states: list[dict[str, Any]], entries: list[str]) -> DeviceCounts:
    found: dict[str, Tensor] = {}
    for name in counts.COUNTS:
        if name not in entries:
            continue
        numbers = [s[name] for s in states]
        as_one = counts.together(numbers)
        if as_one is None:
            numbers = counts.side_by_side(numbers)
            as_one = counts.together(numbers)
            for s, number in zip(states, numbers, strict=True):
                s[name] = number
        if as_one is None:
            raise ValueError(f"with capturable=True, every {name!r} must be one number of the same dtype and device")
        found[name] = as_one
    return DeviceCounts(groups, found["step"], found.get("mu_product"))


def _scales(parameters: list[Tensor], states: list[dict[str, Any]], name: str) -> list[Tensor | None]:
    """Return the scales of a moment of every parameter, None for a moment that has none; empty if none has any."""
    pairs = zip(parameters, states, strict=True)
    found = [local_scales(s[SCALE_OF[name]], p) if is_coded(s) and name in s else None for p, s in pairs]
    return found if any(scales is not None for scales in found) else []


def _largest(state: dict[str, Any]) -> Tensor:
    found: Tensor | None = state.get("max_exp_avg_sq")
    return torch.zeros_like(state["exp_avg_sq"], memory_format=torch.preserve_format) if found is None else found


class Snapshot:
    """The objects that a plan was made of, to notice when a parameter or an entry of its state has been replaced.

    ``leaves`` are all parameters that are stepped, including those of every ring slot.
    """

    def __init__(self, groups: list[dict[str, Any]], state: dict[Any, Any], leaves: list[Tensor]) -> None:
        self._objects = list(_objects(groups, state))
        self._special = [(p, local(p)) for p in leaves if not is_plain(p) and not is_resolved(p)]

    def holds(self, groups: list[dict[str, Any]], state: dict[Any, Any]) -> bool:
        """Return whether all objects are still the same, and local shards still where they were."""
        module, _ = extension.load()
        if module is not None:
            same = module.holds(groups, state, self._objects)
        else:
            now = list(_objects(groups, state))
            same = len(now) == len(self._objects) and all(map(is_, now, self._objects))
        return bool(same) and all(_same_place(local(p), then) for p, then in self._special)


def _objects(groups: list[dict[str, Any]], state: dict[Any, Any]) -> Iterator[Any]:
    for group in groups:
        yield from group["params"]
    for key, entry in state.items():
        if not isinstance(key, Tensor):
            continue  # an entry of the user's own
        yield entry
        if isinstance(entry, dict):
            yield from entry.values()


def _same_place(now: Tensor, then: Tensor) -> bool:
    return now.data_ptr() == then.data_ptr() and now.shape == then.shape and now.stride() == then.stride()
