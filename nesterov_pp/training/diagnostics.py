"""The measurements that ``--diagnostics`` takes during a run."""

from __future__ import annotations

from typing import Any

from nesterov_pp.analysis import AlignmentMeter
from nesterov_pp.pipeline import VirtualPipeline
from nesterov_pp.training.config import UserError


class Diagnostics:
    """Proposition 1's cosine (arXiv 2505.01099) for every stage with a delay; see ``AlignmentMeter``.

    Args:
        pipe: the pipeline, whose stashes are read.
        every: updates between the starts of two measurements of a stage.

    Raises:
        UserError: the method's optimizer has no direction to look ahead along.
    """

    def __init__(self, pipe: VirtualPipeline, every: int) -> None:
        parts = zip(pipe.stashes, pipe.optimizers, pipe.delays, strict=True)
        try:
            self._meters = {
                i: AlignmentMeter(stash, optimizer, every)
                for i, (stash, optimizer, delay) in enumerate(parts, start=1)
                if optimizer is not None and delay > 0
            }
        except ValueError as error:
            raise UserError(f"--diagnostics does not work with method {pipe.recipe.name}: {error}") from None

    def observe(self) -> list[tuple[int, float]]:
        """Return stage (from 1) and cosine of each measurement that ended; to be called after each update."""
        ended = [(stage, meter.observe()) for stage, meter in self._meters.items()]
        return [(stage, cosine) for stage, cosine in ended if cosine is not None]

    def state_dict(self) -> dict[int, Any]:
        """Return the measurements in progress, by stage."""
        return {stage: meter.state_dict() for stage, meter in self._meters.items()}

    def load_state_dict(self, state: dict[int, Any]) -> None:
        """Continue the measurements of ``state_dict``; a stage that is not in it starts anew.

        Raises:
            ValueError: the measurements are of stages with other parameters.
        """
        for stage, meter in self._meters.items():
            if stage in state:
                meter.load_state_dict(state[stage])
