"""What every backend offers to an optimizer: the list of its tensors, and one pass over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from nesterov_pp.kernels.scalars import Coefficients, Correction, CorrectionKind, Normaliser

StepClass = tuple[int, float, float]
"""Parameters of one group with one step count: (group index, steps done, product of mu so far)."""


class StepSlots(NamedTuple):
    """The ring slots of a step: those of the gradients, of the weights read, and of the weights written."""

    grads: int = 0
    source: int = 0
    target: int = 0


@dataclass(frozen=True)
class Tensors:
    """The tensors of one optimizer; every list runs over its parameters.

    ``numbers[i]`` is the parameter's number in the optimizer, ``slots[s][i]`` the parameter in ring slot ``s`` (one
    slot where there is no ring). ``masters[i]`` is None, or the float32 weights that are stepped, of which the others
    take copies. ``exp_avg_sqs`` is empty where the rule has no second moment, ``mu_products`` where it has no momentum
    schedule, both it and ``steps`` where the caller counts, ``max_exp_avg_sqs`` where no group is AMSGrad's.

    ``means`` are the running means of a correction of this ``kind``, if it has one. ``shadows`` are copies outside the
    ring where a step predicts: with ``ring_predicts`` they are stepped while the slots take predicted weights; else
    they take what is predicted.
    """

    names: list[str]
    numbers: list[int]
    groups: list[int]
    slots: list[list[Tensor]]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    masters: list[Tensor | None]
    steps: list[Tensor]
    mu_products: list[Tensor]
    max_exp_avg_sqs: list[Tensor | None]
    normaliser: Normaliser = Normaliser.RMS
    kind: CorrectionKind = CorrectionKind.NONE
    means: list[Tensor] = field(default_factory=list)
    shadows: list[Tensor] = field(default_factory=list)
    ring_predicts: bool = False

    @property
    def corrects(self) -> bool:
        """Whether a step takes ``Correction`` scalars too."""
        return bool(self.shadows) or self.kind != CorrectionKind.NONE


class Plan(Protocol):
    """A step in two halves: everything is checked in the first, everything is written in the second."""

    on_device: bool
    """Whether the pass runs on a device that the host does not wait for; then gradients are scaled by ``scale``."""

    def collect(self, slots: StepSlots) -> list[StepClass]:
        """Take the gradients for a step between slots.

        Returns the classes of the parameters that have a gradient. Changes nothing.

        Raises:
            ValueError: a tensor does not fit its parameter (shape, dtype, device, layout).
        """

    @property
    def steps_run(self) -> int:
        """How many steps have been run: for a caller who was interrupted between one and what he does after it."""

    def forget(self) -> None:
        """Let go of the gradients collected, if the step has not been run."""

    def gradient_norm(self) -> float:
        """Euclidean norm of all gradients collected, reading each once; 0 where there is none."""

    def nonfinite_parameter(self) -> str:
        """The first parameter whose gradient is not finite everywhere; empty if there is none."""

    def scale(self, scale: float, limit: float | None, grad_scale: Tensor | None) -> Tensor | None:
        """Have the next ``apply`` divide the gradients by ``grad_scale`` and clip them to the norm ``limit``.

        Everything stays on the device. Returns the norm, of gradients times ``scale`` and unscaled, in float64; None
        where nothing is clipped. Only of plans that are ``on_device``.
        """

    def apply(
        self, rows: Sequence[Coefficients], mu_products: Sequence[float], corrections: Sequence[Correction] = ()
    ) -> None:
        """Run the step collected, with one row and one new mu product for each class, and count it.

        ``corrections``: one for each class where the tensors are to be corrected; else none.
        """

    def apply_rows(self, rows: Tensor) -> None:
        """Run the step collected, of a plan that was given no ``steps``, for the caller counts.

        ``rows``: float64 of shape ``[parameters, 10]`` on the device, each one's coefficients and the number of its
        step, 0 for no step. Only of plans that are ``on_device``.
        """
