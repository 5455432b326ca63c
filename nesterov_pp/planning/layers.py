"""The costs of a model's layers: time and memory, measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nesterov_pp.optim import NAdam
from nesterov_pp.pipeline.partition import balanced_sizes

_STEPS, _MANY = 20, 10_000


@dataclass(frozen=True)
class StageCost:
    """The costs of one microbatch on a stage (``step``: of one update), in seconds and bytes.

    ``message_bytes`` is the size of the output sent to the next stage; a gradient of that size comes back.
    ``activation_bytes`` is what a microbatch keeps from its forward to its backward.
    """

    forward: float
    backward: float
    step: float = 0.0
    message_bytes: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0


LayerCost = StageCost
"""The costs of one layer, in the same form."""


def stage_costs(layers: Sequence[LayerCost], stages: int, speed: float = 1.0) -> list[StageCost]:
    """Return the costs of ``stages`` stages of consecutive layers, with the slowest stage as fast as possible.

    ``speed`` is how many times faster than measured the stages compute.

    Raises:
        ValueError: there are more stages than layers.
    """
    if not 1 <= stages <= len(layers):
        raise ValueError(f"{len(layers)} layers cannot be cut into {stages} stages")
    nanoseconds = [max(1, round(1e9 * (c.forward + c.backward + c.step))) for c in layers]
    result, first = [], 0
    for size in balanced_sizes(nanoseconds, stages):
        part = layers[first : first + size]
        first += size
        result.append(
            StageCost(
                forward=sum(c.forward for c in part) / speed,
                backward=sum(c.backward for c in part) / speed,
                step=sum(c.step for c in part) / speed,
                message_bytes=part[-1].message_bytes,
                weight_bytes=sum(c.weight_bytes for c in part),
                activation_bytes=sum(c.activation_bytes for c in part),
            )
        )
    return result


def measure_layers(
    layers: Sequence[nn.Module],
    inputs: Tensor,
    loss_fn: Callable[[Tensor], Tensor],
    repeats: int = 5,
    rule: Callable[[list[Tensor]], Optimizer] = NAdam,
) -> list[LayerCost]:
    """Measure each layer's costs on ``inputs``, with times the medians of ``repeats``.

    ``loss_fn`` counts as part of the last layer. ``rule`` builds the optimizer whose steps are measured; a step's time
    is the mean over 20, since rules with bases renew them in some steps only. The layers' weights are updated, so pass
    layers that are not needed afterwards.
    """
    costs, hidden = [], inputs
    for k, layer in enumerate(layers):
        last = k == len(layers) - 1
        cost, hidden = _measure(layer, hidden, loss_fn if last else None, repeats, rule)
        costs.append(cost)
    return costs


def _measure(
    layer: nn.Module,
    inputs: Tensor,
    loss_fn: Callable[[Tensor], Tensor] | None,
    repeats: int,
    rule: Callable[[list[Tensor]], Optimizer],
) -> tuple[LayerCost, Tensor]:
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    trainable: list[Tensor] = [p for p in layer.parameters() if p.requires_grad]
    rounds: list[list[float]] = []
    for _ in range(repeats + 1):
        leaf = inputs.detach().requires_grad_() if inputs.is_floating_point() else inputs
        kept.clear()
        times = [_now(leaf)]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            output: Tensor = layer(leaf)
            result = output if loss_fn is None else loss_fn(output)
        times.append(_now(leaf))
        if result.requires_grad:
            result.backward(torch.ones_like(result))  # type: ignore[no-untyped-call]
        times.append(_now(leaf))
        if len(rounds) < repeats:
            layer.zero_grad()
        rounds.append([after - before for before, after in pairwise(times)])
    forward, backward = map(median, zip(*rounds[1:], strict=True))  # the first round warms up
    cost = LayerCost(
        forward=forward,
        backward=backward,
        step=_step_time(rule(trainable), leaf, repeats) if trainable else 0.0,
        message_bytes=0 if loss_fn is not None else output.numel() * output.element_size(),
        weight_bytes=sum(p.numel() * p.element_size() for p in layer.parameters()),
        activation_bytes=sum(kept.values()),
    )
    return cost, output.detach()


def _step_time(optimizer: Optimizer, where: Tensor, repeats: int) -> float:
    """Return the seconds of a step in a long run, a median of means over ``_STEPS``."""
    optimizer.step()
    for state in optimizer.state.values():
        state["step"].fill_(_MANY)
    times = [_now(where)]
    for _ in range(repeats):
        for _ in range(_STEPS):
            optimizer.step()
        times.append(_now(where))
    return median((after - before) / _STEPS for before, after in pairwise(times))


def _now(t: Any) -> float:
    if t.device.type == "cuda":
        torch.cuda.synchronize(t.device)
    return time.perf_counter()
