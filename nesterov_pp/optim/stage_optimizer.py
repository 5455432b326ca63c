"""What a pipeline asks of a stage's optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class StageOptimizer(Protocol):
    """Steps the weights of one ``WeightStash``. Its groups take ``"lr"`` and, where it looks ahead, ``"horizon"``."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Hyper-parameters that may change from step to step."""

    @property
    def state(self) -> Mapping[Any, dict[str, Any]]:
        """The state of every parameter, by parameter."""

    def step(self, *, version: int | None = None, microbatches: int = 1) -> None:
        """Take the gradients of a version, the sum over some microbatches, and write the next version."""

    def state_dict(self) -> dict[str, Any]:
        """All of its state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
