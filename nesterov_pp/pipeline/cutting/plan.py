"""Which entries of a model belong to which stage, and what every stage computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from nesterov_pp.pipeline.partition import balanced_sizes


class Part(NamedTuple):
    """A stage: layers ``start`` to ``stop`` (exclusive), and what comes before and after all layers if it is there."""

    start: int
    stop: int
    first: bool
    last: bool


class Plan(NamedTuple):
    """A model that can be cut between its layers.

    Attributes:
        before: names of the entries that are used before the layers.
        layers: names of the layers, in order.
        after: names of the entries that are used after the layers.
        stage: returns what a stage computes, ``(shell, *inputs) -> outputs``, and the modules that stand in for others.
    """

    before: set[str]
    layers: list[str]
    after: set[str]
    stage: Callable[[Part], tuple[Callable[..., Any], Mapping[str, nn.Module]]]


def below(names: Iterable[str], prefixes: Iterable[str]) -> set[str]:
    """Return the names that are one of ``prefixes``, or lie below it in the tree of modules."""
    heads = tuple(f"{prefix}." for prefix in prefixes if prefix)
    exact = {prefix for prefix in prefixes if prefix}
    return {name for name in names if name in exact or name.startswith(heads)} if exact else set()


def parts_of(plan: Plan, named: Mapping[str, Tensor], stages: int | Sequence[int]) -> list[Part]:
    """Return the stages of a model.

    Args:
        plan: the model's plan.
        named: ``entries(model)``.
        stages: the number of stages, to minimize the parameters of the largest one; or the number of layers of each.

    Raises:
        ValueError: the layers cannot be divided in this way.
    """
    n = len(plan.layers)
    ends = int(bool(plan.before)), int(bool(plan.after))
    if isinstance(stages, int):
        costs = [_size(named, below(named, [layer])) for layer in plan.layers]
        costs = [_size(named, plan.before)] * ends[0] + costs + [_size(named, plan.after)] * ends[1]
        if not 1 <= stages <= len(costs):
            ends_too = " and what comes before and after them" if any(ends) else ""
            raise ValueError(f"{n} layers{ends_too} cannot be cut into {stages} stages; use 1 to {len(costs)}")
        sizes = balanced_sizes(costs, stages)
        sizes[0] -= ends[0]
        sizes[-1] -= ends[1]
    else:
        sizes = list(stages)
        least = [0 if (i == 0 and ends[0]) or (i == len(sizes) - 1 and ends[1]) else 1 for i in range(len(sizes))]
        if not sizes or sum(sizes) != n or any(size < low for size, low in zip(sizes, least, strict=True)):
            raise ValueError(
                f"stages of {n} layers need sizes that add up to {n}, each at least 1 (the first and the last may be 0 "
                f"if they hold what comes before and after the layers), not {sizes}"
            )
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    count = len(sizes)
    return [Part(starts[i], starts[i + 1], i == 0, i == count - 1) for i in range(count)]


def homes_of(plan: Plan, named: Mapping[str, Tensor], parts: Sequence[Part]) -> dict[str, int]:
    """Return the stage of every entry.

    Raises:
        ValueError: an entry is used neither before, in nor after the layers.
    """
    homes = dict.fromkeys(plan.before, 0) | {name: len(parts) - 1 for name in plan.after}
    for k, part in enumerate(parts):
        homes |= dict.fromkeys(below(named, plan.layers[part.start : part.stop]), k)
    lost = [name for name in named if name not in homes]
    if lost:
        raise ValueError(
            f"{lost[0]} is in none of the layers; say with before= or after= how it is used, and on which side of them"
        )
    return homes


def tied_across(named: Mapping[str, Tensor], homes: Mapping[str, int]) -> dict[str, str]:
    """Return the entries that are also an entry of an earlier stage, with the name that this one has there."""
    first: dict[int, str] = {}
    for name in sorted(named, key=homes.__getitem__):
        first.setdefault(id(named[name]), name)
    return {name: first[id(t)] for name, t in named.items() if homes[first[id(t)]] != homes[name]}


def untie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Give each of the entries ``tied`` of a model its own copy.

    Raises:
        ValueError: the two names are those of one module, which cannot hold two copies; nothing is changed.
    """
    places = {name: name.rpartition(".") for name in tied}
    for name, (prefix, _, _) in places.items():
        source = tied[name].rpartition(".")[0]
        if model.get_submodule(prefix) is model.get_submodule(source):
            raise ValueError(
                f"{prefix or 'the model'} and {source or 'the model'} are one module, which cannot be on two stages; "
                "cut between other layers, or build the model with two modules"
            )
    for prefix, _, key in places.values():
        module = model.get_submodule(prefix)
        if key in module._parameters:
            p = module._parameters[key]
            assert p is not None
            module._parameters[key] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
        else:
            buffer = module._buffers[key]
            assert buffer is not None
            module._buffers[key] = buffer.clone()


def _size(named: Mapping[str, Tensor], names: Iterable[str]) -> int:
    """Return the number of elements of the parameters among ``names``; one that is there twice counts once."""
    return sum({id(p): p.numel() for p in map(named.__getitem__, names) if isinstance(p, nn.Parameter)}.values())
