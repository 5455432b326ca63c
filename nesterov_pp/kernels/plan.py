"""What every backend offers to an optimizer: the list of its tensors, and one pass over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nesterov_pp.kernels.coefficients import Coefficients

StepClass = tuple[int, float, float]
"""Parameters of one group with one step count: (group index, steps done, product of mu so far)."""


@dataclass(frozen=True)
class Tensors:
    """The tensors of one optimizer; every list runs over its parameters.

    ``slots[s][i]`` is parameter ``i`` in ring slot ``s`` (one slot where there is no ring). ``exp_avg_sqs`` is empty
    for non-adaptive rules and ``mu_products`` for rules without a momentum schedule.
    """

    names: list[str]
    groups: list[int]
    slots: list[list[Tensor]]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    mu_products: list[Tensor]


class Plan(Protocol):
    """A step in two halves: everything is checked in the first, everything is written in the second."""

    def collect(self, grads_of: int, source: int, target: int) -> list[StepClass]:
        """Take the gradients of slot ``grads_of`` for a step from slot ``source`` to slot ``target``.

        Returns the classes of the parameters that have a gradient. Changes nothing.

        Raises:
            ValueError: a tensor does not fit its parameter (shape, dtype, device, layout).
        """

    def gradient_norm(self) -> float:
        """Euclidean norm of all gradients collected, reading each once; 0 where there is none."""

    def nonfinite_parameter(self) -> str:
        """The first parameter whose gradient is not finite everywhere; empty if there is none."""

    def apply(self, rows: Sequence[Coefficients], mu_products: Sequence[float]) -> None:
        """Run the step collected, with one row and one new mu product for each class, and count it."""
