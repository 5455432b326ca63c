"""Cutting any model that is a list of layers, with something before and something after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from nesterov_pp.pipeline.cutting.plan import Part, Plan, below
from nesterov_pp.pipeline.cutting.stage_module import entries
from nesterov_pp.pipeline.stage import run_stage

Side = Callable[..., Any] | str | Sequence[str]
"""``(model, *inputs) -> hidden``, or the names of the modules that are applied in turn."""


@dataclass(frozen=True)
class InTurn:
    """Applies modules of a model in turn; what is handed on beside the hidden state is kept, or dropped at the end."""

    names: tuple[str, ...]
    keeps: bool

    def __call__(self, model: nn.Module, hidden: Any, *context: Any) -> Any:
        for name in self.names:
            hidden = model.get_submodule(name)(hidden)
        return (hidden, *context) if context and self.keeps else hidden


@dataclass(frozen=True)
class Chain:
    """What a stage computes: some layers in turn, with ``before`` and ``after`` where they are not None."""

    before: Callable[..., Any] | None
    layers: list[str]
    after: Callable[..., Any] | None
    each: Callable[..., Any] | None

    def __call__(self, shell: nn.Module, *inputs: Any, **named: Any) -> Any:
        if self.before is not None:
            value = self.before(shell, *inputs, **named)
        elif named and inputs:
            raise ValueError("a stage takes its inputs by position or by name; without `before`, it cannot take both")
        else:
            value = named or (inputs[0] if len(inputs) == 1 else inputs)
        for name in self.layers:
            layer = shell.get_submodule(name)
            output = run_stage(layer if self.each is None else partial(self.each, shell, layer), value)
            if isinstance(value, tuple) and not isinstance(output, tuple | dict):
                output = (output, *value[1:])
            value = output
        return value if self.after is None else run_stage(partial(self.after, shell), value)


def chain_plan(
    model: nn.Module,
    layers: str | Sequence[str],
    before: Side | None,
    after: Side | None,
    each: Callable[..., Any] | None,
) -> Plan:
    """Return the plan of a model whose lists of layers have the names ``layers``; see ``cut`` for the arguments.

    Raises:
        ValueError: there is no module of one of these names, a list has no layers, or something is named twice.
    """
    position = {name: i for i, name in enumerate(entries(model))}
    names = [name for listed in _as_names(layers) for name in _expanded(model, listed)]
    for i, name in enumerate(names):
        if any(other == name or other.startswith(f"{name}.") for other in names[:i] + names[i + 1 :]):
            raise ValueError(f"{name} is among the layers more than once")
    inside = below(position, names)
    begin, own_before = _side(model, before, keeps=True)
    end, own_after = _side(model, after, keeps=False)
    twice = sorted((own_before & own_after) | ((own_before | own_after) & inside))
    if twice:
        raise ValueError(f"{twice[0]} is named more than once; it is used before, in or after the layers")
    start = min((position[name] for name in inside), default=len(position))
    free = position.keys() - inside - own_before - own_after
    # A function does not say which modules it calls: those that the model defines on its side of the layers.
    if callable(before):
        own_before |= {name for name in free if not callable(after) or position[name] < start}
    if callable(after):
        own_after |= {name for name in free if not callable(before) or position[name] >= start}

    def stage(part: Part) -> tuple[Callable[..., Any], Mapping[str, nn.Module]]:
        chosen = names[part.start : part.stop]
        return Chain(begin if part.first else None, chosen, end if part.last else None, each), {}

    return Plan(own_before, names, own_after, stage)


def lists_of(model: nn.Module) -> list[str]:
    """Return the names of a model's outermost lists of layers."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if name and not inside and isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
            found.append(name)
    return found


def _side(model: nn.Module, side: Side | None, *, keeps: bool) -> tuple[Callable[..., Any] | None, set[str]]:
    """Return what is called on one side of the layers, and the entries of the modules that it names."""
    if side is None or callable(side):
        return side, set()
    names = _as_names(side)
    for name in names:
        _module(model, name)
    return InTurn(names, keeps), below(entries(model), names)


def _as_names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        lists = ", ".join(map(repr, lists_of(model))) or "none"
        raise ValueError(f"{type(model).__name__} has no module {name!r}; its lists of layers are {lists}") from None


def _expanded(model: nn.Module, name: str) -> list[str]:
    module = _module(model, name)
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return [name]
    if not len(module):
        raise ValueError(f"{name or 'the model'} has no layers")
    return [f"{name}.{key}" if name else key for key in module._modules]
