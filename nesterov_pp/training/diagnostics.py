"""What ``--diagnostics`` measures during a run. It owns the meters, and the run hands it the places to write to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nesterov_pp.analysis import AlignmentMeter
from nesterov_pp.pipeline import VirtualPipeline
from nesterov_pp.training.metrics import MetricsLog

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Diagnostics:
    """Proposition 1's cosine (arXiv 2505.01099) for every stage with a delay; see ``AlignmentMeter``.

    Args:
        pipe: the pipeline, whose stashes are read.
        every: updates between the beginnings of two measurements of a stage.
    """

    def __init__(self, pipe: VirtualPipeline, every: int) -> None:
        parts = zip(pipe.stashes, pipe.optimizers, pipe.delays, strict=True)
        self._meters = {
            i: AlignmentMeter(stash, optimizer, every)
            for i, (stash, optimizer, delay) in enumerate(parts, start=1)
            if optimizer is not None and delay > 0
        }

    def observe(self, microbatch: int, log: MetricsLog, scalars: SummaryWriter) -> None:
        """To be called after each update; writes what was measured, by stage."""
        for stage, meter in self._meters.items():
            cosine = meter.observe()
            if cosine is not None:
                log.write(microbatch=microbatch, stage=stage, cosine=cosine)
                scalars.add_scalar(f"cosine/stage_{stage}", cosine, microbatch)

    def state_dict(self) -> dict[int, Any]:
        """The measurements under way, by stage."""
        return {stage: meter.state_dict() for stage, meter in self._meters.items()}

    def load_state_dict(self, state: dict[int, Any]) -> None:
        """Go on with the measurements of ``state_dict``.

        Raises:
            ValueError: they are of other stages.
        """
        for stage, meter in self._meters.items():
            if stage in state:
                meter.load_state_dict(state[stage])
