"""The tasks that ``benchmarks.tasks`` trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nesterov_pp.pipeline import VirtualPipeline


@dataclass(frozen=True)
class Task:
    """A model to train, its data, and how the result is judged.

    Attributes:
        what: a description for display.
        methods: the methods compared by default.
        stages: makes the modules from the global random state.
        loss_fn: the loss of outputs and targets.
        microbatch: draws inputs and targets with a random generator.
        judge: evaluates the trained pipeline on data it has not seen; returns numbers by name, the first a loss.
    """

    what: str
    methods: tuple[str, ...]
    stages: Callable[[], list[nn.Module]]
    loss_fn: Callable[[Any, Any], Tensor]
    microbatch: Callable[[torch.Generator], tuple[Any, Tensor]]
    judge: Callable[[VirtualPipeline], dict[str, float]]
