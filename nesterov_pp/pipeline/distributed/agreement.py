"""What the processes of a pipeline compare before their first step: a run with differences would be wrong or hang."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nesterov_pp.optim.local import is_dtensor
from nesterov_pp.pipeline.distributed.store import PipelineError

_HASHED = 4096
"""A print takes this many values of a parameter."""


class Print(NamedTuple):
    """A trainable parameter, recognised by its shape and values.

    Attributes:
        elsewhere: whether a module outside of the stage holds it too, in the process of that stage.
    """

    name: str
    values: str
    elsewhere: bool


class Report(NamedTuple):
    """What one process tells the others."""

    rank: int
    stage: int
    settings: dict[str, Any]
    prints: list[Print]


def prints_of(module: nn.Module) -> list[Print]:
    """Return the prints of a stage's trainable parameters, except those whose values are all the same."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad and not is_dtensor(p)}
    values = {name: found for name, p in named.items() if (found := _values(p.detach())) is not None}
    held = _held_elsewhere(module, {id(named[name]) for name in values})
    return [Print(name, found, id(named[name]) in held) for name, found in values.items()]


def _values(p: Tensor) -> str | None:
    head = p.reshape(-1)[:_HASHED].contiguous().cpu()
    if head.numel() < 2 or bool((head == head[0]).all()):
        return None
    data = head.view(torch.uint8).numpy().tobytes()
    return f"{tuple(p.shape)} {p.dtype} {hashlib.blake2b(data, digest_size=16).hexdigest()}"


def _held_elsewhere(module: nn.Module, parameters: set[int]) -> set[int]:
    """Return which of the parameters a module outside of ``module`` holds."""
    own = {id(part) for part in module.modules()}
    return {
        id(p)
        for part in gc.get_objects()
        if issubclass(type(part), nn.Module) and id(part) not in own and "_parameters" in vars(part)
        for p in part._parameters.values()
        if id(p) in parameters
    }


def check_agreement(reports: Sequence[Report]) -> None:
    """Check that all processes have the same settings, and that no two stages share a parameter.

    Two stages share one if it has the same values on both, and both processes hold it in another module as well: in the
    stage that they do not run.

    Raises:
        PipelineError: a setting differs, or a parameter is tied across stages.
    """
    first, *others = reports
    for other in others:
        for name, value in other.settings.items():
            if first.settings[name] != value:
                raise PipelineError(
                    f"process {first.rank} has {name} {first.settings[name]}, process {other.rank} has {value}; all "
                    "processes of a pipeline need the same"
                )
    home: dict[str, tuple[int, str]] = {}
    for report in reports:
        for name, values, elsewhere in report.prints:
            stage, there = home.setdefault(values, (report.stage, name)) if elsewhere else (report.stage, name)
            if stage != report.stage:
                raise PipelineError(
                    f"stage {report.stage}'s {name} is stage {stage}'s {there}: tied parameters must be in one stage; "
                    "untie them, or put both into the same stage"
                )
