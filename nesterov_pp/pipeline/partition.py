"""Partitioning of a model into stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from nesterov_pp.pipeline.tensors import as_inputs, map_tensors, tensors_of


def split_sequential(model: nn.Sequential, partition: int | Sequence[int]) -> list[nn.Sequential]:
    """Cut ``model`` into stages.

    Args:
        model: the layers in order.
        partition: the number of layers of each stage, or the number of stages. Given a number of stages, the cut
            minimizes the parameters of the largest stage.

    Raises:
        ValueError: the sizes are not positive or do not add up to the number of layers, or there are more stages than
            layers.
    """
    layers = list(model)
    if isinstance(partition, int):
        if not 1 <= partition <= len(layers):
            raise ValueError(f"{len(layers)} layers cannot be cut into {partition} stages; use 1 to {len(layers)}")
        sizes = balanced_sizes(parameter_costs(layers), partition)
    else:
        sizes = list(partition)
    if any(size < 1 for size in sizes) or sum(sizes) != len(layers):
        raise ValueError(
            f"a partition of {len(layers)} layers needs positive sizes that add up to {len(layers)}, not {sizes}"
        )
    stages, start = [], 0
    for size in sizes:
        stages.append(nn.Sequential(*layers[start : start + size]))
        start += size
    return stages


def balanced_sizes(costs: Sequence[int], parts: int) -> list[int]:
    """Return the lengths of ``parts`` consecutive, non-empty runs of ``costs`` that minimize the largest sum."""
    n = len(costs)
    total = [0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[k][j]: the largest sum of a run, minimized over the ways to cut the first j costs into k runs.
    # cut[k][j]: the start of the last run in that cut.
    best = [[float("inf")] * (n + 1) for _ in range(parts + 1)]
    cut = [[0] * (n + 1) for _ in range(parts + 1)]
    best[0][0] = 0.0
    for k in range(1, parts + 1):
        for j in range(k, n + 1):
            for i in range(k - 1, j):
                largest = max(best[k - 1][i], float(total[j] - total[i]))
                if largest < best[k][j]:
                    best[k][j], cut[k][j] = largest, i
    sizes, j = [], n
    for k in range(parts, 0, -1):
        sizes.append(j - cut[k][j])
        j = cut[k][j]
    return sizes[::-1]


def check_untied(stages: Sequence[nn.Module]) -> None:
    """Refuse a parameter that two stages share, because its copies would be updated at different times.

    Raises:
        ValueError: two stages share a parameter.
    """
    home: dict[int, tuple[int, str]] = {}
    for k, stage in enumerate(stages):
        for name, p in stage.named_parameters():
            owner, first = home.setdefault(id(p), (k, name))
            if owner != k:
                raise ValueError(
                    f"stage {k}'s {name} is stage {owner}'s {first}: tied parameters must be in one stage; "
                    "untie them, or put both into the same stage"
                )


def stage_list(stages: Sequence[nn.Module] | nn.Sequential, partition: int | Sequence[int] | None) -> list[nn.Module]:
    """Return the stages of a pipeline, given as a list or as an ``nn.Sequential`` for ``partition`` to cut.

    Raises:
        ValueError: there are no stages, the model cannot be cut as ``partition`` says, or two stages share a parameter.
    """
    modules: list[nn.Module]
    if partition is not None:
        if not isinstance(stages, nn.Sequential):
            raise ValueError("partition needs an nn.Sequential; a list of stages is cut already")
        modules = list(split_sequential(stages, partition))
    elif isinstance(stages, nn.Module):
        if not isinstance(stages, nn.Sequential):
            raise ValueError("stages must be a list of modules, or an nn.Sequential with partition=")
        modules = list(stages)
    else:
        modules = list(stages)
    if not modules:
        raise ValueError("a pipeline needs at least one stage")
    check_untied(modules)
    return modules


def own_stage(
    stages: nn.Module | Sequence[nn.Module],
    partition: int | str | Sequence[int] | None,
    count: int,
    index: int,
    agreed: Callable[[Callable[[], list[int]]], list[int]],
    example: Callable[[], Any],
) -> nn.Module:
    """Return the stage of process ``index`` of ``count``.

    Args:
        stages: that stage itself, a list of all stages, or an ``nn.Sequential`` to cut.
        partition: for an ``nn.Sequential``: the number of layers of each stage; the number of stages, or "parameters",
            to minimize the parameters of the largest stage; or "time", to minimize the time of the slowest stage.
        agreed: runs a function on one process and returns its result on all of them.
        example: returns the input of a microbatch, for "time".

    Raises:
        ValueError: the number of stages differs from the number of processes, or the model cannot be cut as
            ``partition`` says.
    """
    if partition is None and isinstance(stages, nn.Module):
        return stages
    if partition in ("time", "parameters") and isinstance(stages, nn.Sequential):
        layers = stages
        if not 1 <= count <= len(layers):
            raise ValueError(
                f"{len(layers)} layers cannot be cut into {count} stages; use 1 to {len(layers)} processes"
            )
        if partition == "time":
            partition = agreed(lambda: balanced_sizes(measured_costs(layers, example()), count))
        else:
            partition = balanced_sizes(parameter_costs(layers), count)
    if isinstance(partition, str):
        raise ValueError(
            f'partition must be "time", "parameters", a number of stages or their sizes, not {partition!r}'
        )
    modules = stage_list(stages, partition)  # type: ignore[arg-type]
    if len(modules) != count:
        raise ValueError(
            f"{len(modules)} stages need {len(modules)} processes per replica, but there are {count}; "
            "start one process for each stage"
        )
    return modules[index]


def parameter_costs(layers: Iterable[nn.Module]) -> list[int]:
    """Return the number of parameters of each layer."""
    return [sum(p.numel() for p in layer.parameters()) for layer in layers]


def measured_costs(layers: nn.Sequential, inputs: Any, repeats: int = 5) -> list[int]:
    """Return the nanoseconds of each layer's forward and backward on ``inputs``, the fastest of ``repeats``.

    Weights, gradients, buffers and the random state are left unchanged.
    """
    buffers = [(b, b.clone()) for b in layers.buffers()]
    costs: list[int] = []
    with torch.random.fork_rng():
        hidden = inputs
        for layer in layers:
            spent, output = zip(*(_timed(layer, hidden) for _ in range(repeats + 1)), strict=True)  # the first warms up
            costs.append(max(1, min(spent[1:])))
            hidden = output[-1]
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return costs


def _timed(layer: nn.Module, hidden: Any) -> tuple[int, Any]:
    """Return the nanoseconds of a layer's forward and backward on copies of its inputs, and its output."""
    copies = map_tensors(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()), hidden)
    on_gpu = any(t.is_cuda for t in tensors_of(copies))
    begin = _now(on_gpu)
    given, leaves = as_inputs(copies)
    output = layer(given)
    roots = [t for t in tensors_of(output) if t.requires_grad]
    sources = [*leaves, *(p for p in layer.parameters() if p.requires_grad)]
    if roots and sources:
        torch.autograd.grad(roots, sources, [torch.ones_like(t) for t in roots], allow_unused=True)
    return _now(on_gpu) - begin, output


def _now(on_gpu: bool) -> int:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter_ns()
