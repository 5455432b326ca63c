"""What every backend offers to an optimizer: the list of its tensors, and one pass over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from nesterov_pp.kernels.coefficients import Coefficients
from nesterov_pp.kernels.corrections import Correction, Kind

StepClass = tuple[int, float, float]
"""Parameters of one group with one step count: (group index, steps done, product of mu so far)."""


@dataclass(frozen=True)
class Tensors:
    """The tensors of one optimizer; every list runs over its parameters.

    ``numbers[i]`` is the parameter's number in the optimizer, ``slots[s][i]`` the parameter in ring slot ``s`` (one
    slot where there is no ring). ``masters[i]`` is None, or the float32 weights that are stepped and copied to the
    parameter. ``exp_avg_sqs`` is empty for non-adaptive rules, ``mu_products`` for rules without a momentum schedule,
    both it and ``steps`` where the caller counts, ``max_exp_avg_sqs`` where no group is AMSGrad's.

    With a correction (``kind``, or ``predicts``) ``means`` are its running means, if it has one. ``predicts``: the
    slots take predicted weights ``x``, and ``masters`` of the parameters' dtype are stepped; or, where there are
    ``besides``, these take ``x``, and the slots are stepped.
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
    kind: Kind = Kind.NONE
    predicts: bool = False
    means: list[Tensor] = field(default_factory=list)
    besides: list[Tensor] = field(default_factory=list)

    @property
    def corrects(self) -> bool:
        """Whether a step takes ``Correction`` scalars too."""
        return self.predicts or self.kind != Kind.NONE


class Plan(Protocol):
    """A step in two halves: everything is checked in the first, everything is written in the second."""

    on_device: bool
    """Whether the pass runs on a device that the host does not wait for; then gradients are scaled by ``scale``."""

    def collect(self, grads_of: int, source: int, target: int) -> list[StepClass]:
        """Take the gradients of slot ``grads_of`` for a step from slot ``source`` to slot ``target``.

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
