"""Step counts that stay on the device, so that each replay of a captured step is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nesterov_pp.kernels import DEVICE_BACKENDS, Coefficients, Correction
from nesterov_pp.kernels.capture import captures
from nesterov_pp.optim.local import is_dtensor
from nesterov_pp.optim.options import Options

RowOf = Callable[[int, Any, Any], tuple[Coefficients, Any]]
"""Maps (group, step from 1, product of mu so far) to coefficients and the new product: numbers, or tensors of many."""

CorrectionOf = Callable[[int, Any, Coefficients], Correction]
"""Maps (group, step from 1, coefficients) to the scalars of a correction."""


class DeviceCounts:
    """The counts of all parameters on one device in two tensors; every parameter's ``step`` is an element of the first.

    Args:
        groups: index of the parameter group of each parameter.
        steps: float32 or float64 tensor of shape ``[parameters]``.
        mu_products: tensor of the same kind; None for rules without a momentum schedule.
    """

    def __init__(self, groups: Sequence[int], steps: Tensor, mu_products: Tensor | None) -> None:
        self._groups = list(groups)
        self._steps = steps
        self._mu_products = mu_products
        self._stepped: list[bool] | None = None
        self._members: dict[int, Tensor] = {}

    @torch.no_grad()
    def next_step(
        self, stepped: list[bool], row_of: RowOf, correction_of: CorrectionOf | None, found_inf: Tensor | None
    ) -> tuple[Tensor, Callable[[], None]]:
        """Compute the next step of the parameters ``stepped``; no step is taken if ``found_inf`` is above 0.

        Returns:
            A float64 tensor of shape ``[parameters, 10]``: each parameter's coefficients and step number (0 for no
            step), with ``correction_of`` followed by 7 more scalars; and a function that counts the step, to be called
            once the step is launched. Nothing waits for the device.
        """
        if stepped != self._stepped:
            self._members = self._by_group(stepped)
            self._stepped = stepped
        device = self._steps.device
        taken = torch.ones((), dtype=torch.float64, device=device)
        if isinstance(found_inf, Tensor):  # a scaler that saw no gradient leaves a plain 0
            taken = (found_inf.reshape(()).to(device) <= 0).double()
        words = len(Coefficients._fields) + 1 + (0 if correction_of is None else len(Correction._fields))
        rows = torch.zeros(len(self._groups), words, dtype=torch.float64, device=device)
        products = []
        for group, members in self._members.items():
            number = self._steps[members].double() + 1
            product = 1.0 if self._mu_products is None else self._mu_products[members].double()
            row, product = row_of(group, number, product)
            correction = () if correction_of is None else correction_of(group, number, row)
            columns = [*row, number * taken, *correction]
            rows[members] = torch.stack([_filled(value, number) for value in columns], dim=1)
            products.append((members, product))
        return rows, partial(self._count, taken, products)

    @torch.no_grad()
    def _count(self, taken: Tensor, products: list[tuple[Tensor, Any]]) -> None:
        for members, product in products:
            self._steps[members] += taken.to(self._steps.dtype)
            if self._mu_products is not None:
                then = self._mu_products[members]
                self._mu_products[members] = torch.where(taken > 0, product.to(then.dtype), then)

    def _by_group(self, stepped: list[bool]) -> dict[int, Tensor]:
        numbers: dict[int, list[int]] = {}
        for i, (group, steps) in enumerate(zip(self._groups, stepped, strict=True)):
            if steps:
                numbers.setdefault(group, []).append(i)
        return {group: torch.tensor(members, device=self._steps.device) for group, members in numbers.items()}


def needs_host(options: Options, parameters: Sequence[Tensor]) -> str | None:
    """Return what makes a step count on the host, an option or a kind of parameter, or None."""
    if options.on_nonfinite == "raise":
        return "on_nonfinite='raise'"
    return "a DTensor parameter" if any(map(is_dtensor, parameters)) else None


def check_capturable(groups: Sequence[dict[str, Any]], options: Options, backend: str, *, has_mu_product: bool) -> None:
    """Refuse ``capturable=True`` on devices where torch refuses it, and where this library cannot capture.

    Raises:
        AssertionError: a parameter is on a device on which torch cannot capture (the message is torch's).
        ValueError: not all groups are capturable, or an option or a parameter needs counts on the host.
        RuntimeError: the backend counts on the host.
    """
    if not all(group.get("capturable") for group in groups):
        raise ValueError("capturable must be the same in all parameter groups, which are stepped together")
    parameters = [p for group in groups for p in group["params"]]
    if backend in DEVICE_BACKENDS:
        what = needs_host(options, parameters)
        if what is not None:
            raise ValueError(f"{what} cannot be used with capturable=True: the host would have to wait for the device")
        return
    from torch.optim.optimizer import _get_capturable_supported_devices

    supported = _get_capturable_supported_devices()
    if any(p.device.type not in supported for p in parameters):
        named = "params, mu_products" if has_mu_product else "params"
        raise AssertionError(f"If capturable=True, {named} and state_steps must be on supported devices: {supported}.")
    raise RuntimeError(f"capturable=True needs the cuda or triton backend, not {backend!r}")


def check_not_captured(optimizer: str) -> None:
    """Refuse, in torch's words, to be captured in a graph with counts on the host, which replays would not advance.

    Raises:
        RuntimeError: the current stream is being captured.
    """
    if captures():
        raise RuntimeError(
            f"Attempting CUDA graph capture of step() for an instance of {optimizer} but param_groups' capturable is "
            "False."
        )


def _filled(value: float | Tensor, like: Tensor) -> Tensor:
    """Return ``value`` as a tensor like ``like``, filled on the device because a copy from the host would wait."""
    if isinstance(value, Tensor):
        return value.to(like.dtype).expand_as(like)
    return torch.full_like(like, value)
