"""The interface of every backend: the list of an optimizer's tensors, and one pass over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from nesterov_pp.kernels.scalars import Coefficients, Correction, CorrectionKind, Normaliser

StepClass = tuple[int, float, float]
"""The parameters of one group that share a step count: (group index, steps done, product of mu so far)."""


class StepSlots(NamedTuple):
    """The ring slots of a step: the slot of the gradients, of the weights read, and of the weights written."""

    grads: int = 0
    source: int = 0
    target: int = 0


@dataclass(frozen=True)
class Tensors:
    """The tensors of one optimizer; every list runs over its parameters.

    ``numbers[i]`` is the number of parameter ``i`` in the optimizer, and ``slots[s][i]`` is the parameter in ring slot
    ``s`` (one slot without a ring). ``masters[i]`` is None, or the float32 weights that are stepped and then copied to
    the parameter. ``exp_avg_sqs`` is empty if the rule has no second moment, ``mu_products`` if it has no momentum
    schedule. ``steps`` and ``mu_products`` are empty if the caller counts the steps. ``max_exp_avg_sqs[i]`` is None
    without AMSGrad, and the list may be empty if no group uses it.

    ``means`` are the running means of a correction of this ``kind``, if it has one. If a step predicts weights,
    ``shadows`` are copies of the weights outside the ring: with ``ring_predicts``, the shadows are stepped and the ring
    slots receive the predicted weights; otherwise the shadows receive the predicted weights.

    ``exp_avg_scales[i]`` and ``exp_avg_sq_scales[i]`` are the scales of moments in eight bits (``kernels/codes.py``),
    whose codes are ``exp_avgs[i]`` and ``exp_avg_sqs[i]``; None for other moments. ``residuals[i]`` is None, or the
    int8 residual of the newest weights, which are then stepped in 24 bits. Each of the three lists may be empty if all
    its entries are None. ``code_seed`` is the seed of the noise that rounds codes.
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
    exp_avg_scales: list[Tensor | None] = field(default_factory=list)
    exp_avg_sq_scales: list[Tensor | None] = field(default_factory=list)
    residuals: list[Tensor | None] = field(default_factory=list)
    code_seed: int = 0

    @property
    def corrects(self) -> bool:
        """Return whether a step also takes ``Correction`` scalars."""
        return bool(self.shadows) or self.kind != CorrectionKind.NONE


class Plan(Protocol):
    """A step in two halves: the first checks everything, the second writes everything."""

    on_device: bool
    """True if the pass runs on a device that the host does not wait for; then ``scale`` scales the gradients."""

    def collect(self, slots: StepSlots) -> list[StepClass]:
        """Collect the gradients for a step between slots, without changing anything.

        Returns:
            the classes of the parameters that have a gradient.

        Raises:
            ValueError: a tensor does not fit its parameter (shape, dtype, device, layout).
        """

    @property
    def steps_run(self) -> int:
        """The number of steps run, for a caller that was interrupted between a step and the work that follows it."""

    def forget(self) -> None:
        """Release the collected gradients if the step has not been run."""

    def gradient_norm(self) -> float:
        """Return the Euclidean norm of all collected gradients, reading each once; 0 if there are none."""

    def nonfinite_parameter(self) -> str:
        """Return the name of the first parameter whose gradient is not finite everywhere; empty if there is none."""

    def scale(self, scale: float, limit: float | None, grad_scale: Tensor | None) -> Tensor | None:
        """Make the next ``apply`` divide the gradients by ``grad_scale`` and clip them to the norm ``limit``.

        Everything stays on the device. Only for plans that are ``on_device``.

        Returns:
            the norm of the gradients times ``scale`` and divided by ``grad_scale``, in float64; None without clipping.
        """

    def apply(
        self, rows: Sequence[Coefficients], mu_products: Sequence[float], corrections: Sequence[Correction] = ()
    ) -> None:
        """Run the collected step, with one row and one new mu product for each class, and count it.

        ``corrections`` has an entry for each class if ``Tensors.corrects``, and is empty otherwise.
        """

    def apply_rows(self, rows: Tensor) -> None:
        """Run the collected step of a plan without ``steps``, whose caller counts.

        ``rows`` is float64 of shape ``[parameters, 10]`` on the device: for each parameter its coefficients and the
        number of its step, 0 for no step. If ``Tensors.corrects``, the 7 scalars of ``Correction`` follow. Only for
        plans that are ``on_device``.
        """
