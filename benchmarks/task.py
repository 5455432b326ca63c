"""What the benchmark of other tasks trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nesterov_pp.pipeline import VirtualPipeline


@dataclass(frozen=True)
class Task:
    """What is trained, and how it is judged.

    Attributes:
        what: for people.
        methods: compared by default.
        stages: the modules, from the global random state.
        microbatch: of a random generator: inputs and targets.
        judge: what the trained pipeline does on data it has not seen, by name; the first number is a loss.
    """

    what: str
    methods: tuple[str, ...]
    stages: Callable[[], list[nn.Module]]
    loss_fn: Callable[[Any, Any], Tensor]
    microbatch: Callable[[torch.Generator], tuple[Any, Tensor]]
    judge: Callable[[VirtualPipeline], dict[str, float]]
