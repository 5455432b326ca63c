"""A stage of a model: the model's tree of modules, in which other modules stand in for those of the other stages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class StageModule(nn.Module):
    """One stage of a model that was cut. Its parameters and buffers have the names that they have in the model.

    It computes ``run(shell, *inputs)``, where ``shell`` has the structure of the whole model, but holds the modules of
    this stage only. These are the model's own, not copies; the rest of the model may be deleted.

    Attributes:
        shell: the module of the model's class that ``run`` is given.
        copied_from: for every parameter that ``untie`` copied, the name of the one that it was tied to.
    """

    shell: nn.Module
    run: Callable[..., Any]

    def __init__(self, shell: nn.Module, run: Callable[..., Any], copied_from: Mapping[str, str]) -> None:
        super().__init__()
        self.run, self.copied_from = run, dict(copied_from)
        # As a submodule, the shell would put its own name before the model's names: it shares its entries instead.
        object.__setattr__(self, "shell", shell)
        self._parameters, self._buffers, self._modules = shell._parameters, shell._buffers, shell._modules
        self._non_persistent_buffers_set = shell._non_persistent_buffers_set
        self.training = shell.training

    def forward(self, *inputs: Any, **named: Any) -> Any:
        self.shell.training = self.training
        return self.run(self.shell, *inputs, **named)


class PassOn(nn.Module):
    """A stand-in that returns its first input."""

    def forward(self, hidden: Any, *_: Any, **__: Any) -> Any:
        return hidden


class Nothing(nn.Module):
    """A stand-in whose output changes no number that it is added to."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return torch.tensor(-0.0)  # -0.0 + -0.0 is -0.0; 0.0 would turn it into 0.0


class Elsewhere(nn.Module):
    """A stand-in for a module that this stage must not need."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(
            f"{self.name} is on another stage of the cut model, but is called on this one; call what comes before the "
            "layers in `before` only, and what comes after them in `after` only"
        )


def entries(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and the persistent buffers of a model, tied ones under each of their names."""
    return {
        f"{prefix}.{key}" if prefix else key: tensor
        for prefix, module in model.named_modules(remove_duplicate=False)
        for key, tensor in _own_entries(module)
    }


def shell_of(module: nn.Module, own: set[str], stand_ins: Mapping[str, nn.Module], name: str = "") -> nn.Module:
    """Return ``module`` without the entries that are not in ``own``.

    Modules whose entries are all in ``own`` (or that have none) are shared with the model; modules with none in ``own``
    are replaced by ``Elsewhere``; the others, on the way to them, are shallow copies of the model's classes.

    Args:
        module: the model, or the submodule called ``name``.
        own: names of entries, as in ``entries(model)``.
        stand_ins: what replaces modules, by name.

    Raises:
        ValueError: the ``forward`` of a module that has to be copied was replaced on the module itself.
    """
    if name in stand_ins:
        return stand_ins[name]
    prefix = f"{name}." if name else ""
    here = {prefix + entry for entry in entries(module)}
    if here <= own and not any(other.startswith(prefix) for other in stand_ins):
        return module
    if not here & own and not any(other.startswith(prefix) for other in stand_ins):
        return Elsewhere(name)
    shell = _shallow_copy(module, name)
    for key, _ in _own_entries(module):
        if prefix + key not in own:
            (shell._parameters if key in shell._parameters else shell._buffers)[key] = None
    for key, child in module._modules.items():
        if child is not None:
            shell._modules[key] = shell_of(child, own, stand_ins, prefix + key)
    return shell


def _own_entries(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for key, p in module._parameters.items():
        if p is not None:
            yield key, p
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in module._non_persistent_buffers_set:
            yield key, buffer


def _shallow_copy(module: nn.Module, name: str) -> nn.Module:
    if "forward" in vars(module):
        raise ValueError(
            f"the forward of {name or 'the model'} was replaced on the module itself (as device_map and "
            "accelerator.prepare do), and would still run the whole model; cut the model before"
        )
    shell = type(module).__new__(type(module))
    for key, value in vars(module).items():
        vars(shell)[key] = copy.copy(value) if isinstance(value, dict | set) else value
    return shell
