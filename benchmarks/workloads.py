"""Parameter lists and the optimizers that are measured on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import nesterov_pp as npp
from benchmarks import plain

Shapes = list[tuple[int, ...]]
STREAMS = 7  # reads p, g, m, v and writes p, m, v: 28 bytes per parameter in float32


def gpt2_small() -> Shapes:
    """Return the shapes of 148 tensors, 124M parameters."""
    width, block = 768, []
    for _ in range(12):
        block += [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
        block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(50257, width), (1024, width), *block, (width,), (width,)]


def tiny_tensors() -> Shapes:
    """Return the shapes of 1,000 tensors of 64 elements, which show what a step costs besides memory traffic."""
    return [(64,)] * 1000


WORKLOADS: dict[str, Callable[[], Shapes]] = {"gpt2-small": gpt2_small, "tiny": tiny_tensors}


class Problem:
    """Parameters with random values and gradients, made once and shared by the peers one after the other."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        self.grads = [(torch.randn(shape, generator=generator) * 1e-2).to(dtype) for shape in shapes]
        self.bytes_per_parameter = STREAMS * dtype.itemsize
        self.elements = sum(w.numel() for w in self.weights)

    def parameters(self) -> list[nn.Parameter]:
        parameters = [nn.Parameter(w.clone()) for w in self.weights]
        for p, g in zip(parameters, self.grads, strict=True):
            p.grad = g
        return parameters


Step = Callable[[], Any]


def torch_nadam(problem: Problem) -> Step:
    """Return the step that the paper's released code runs."""
    return torch.optim.NAdam(problem.parameters(), foreach=True, decoupled_weight_decay=True, weight_decay=0.01).step


def torch_nadam_with_stash(problem: Problem, versions: int = 2) -> Step:
    """Return the step of the paper's released code with its stash, which makes three copies around the step.

    A call loads the old weights, loads the new ones, steps, and clones the result.
    """
    parameters = problem.parameters()
    optimizer = torch.optim.NAdam(parameters, foreach=True, decoupled_weight_decay=True, weight_decay=0.01)
    stash = [[p.detach().clone() for p in parameters] for _ in range(versions)]

    @torch.no_grad()
    def load(version: list[torch.Tensor]) -> None:
        for p, saved in zip(parameters, version, strict=True):
            p.copy_(saved)

    def step() -> None:
        load(stash[0])
        load(stash[-1])
        optimizer.step()
        stash.append([p.detach().clone() for p in parameters])
        stash.pop(0)

    return step


def torch_adamw_fused(problem: Problem) -> Step:
    """Return the step of another method that moves the same bytes: the bandwidth to reach."""
    return torch.optim.AdamW(problem.parameters(), fused=True).step


def ours(problem: Problem) -> Step:
    return npp.NAdam(problem.parameters(), decoupled_weight_decay=True, weight_decay=0.01).step


def ours_with_ring(problem: Problem, versions: int) -> Step:
    """Return a step that reads one ring slot and writes the next; gradients are handed over outside the measurement."""
    module = nn.ParameterList(problem.parameters())
    stash = npp.WeightStash(module, versions)
    optimizer = npp.NAdam(module.parameters(), stash=stash, decoupled_weight_decay=True, weight_decay=0.01)

    def give_gradients() -> None:
        for leaf, grad in zip(stash.parameters(stash.newest).values(), problem.grads, strict=True):
            leaf.grad = grad

    def step() -> None:
        optimizer.step(version=stash.newest)

    step.prepare = give_gradients  # type: ignore[attr-defined]
    for _ in range(versions):
        give_gradients()
        step()
    return step


def ours_clipping(problem: Problem) -> Step:
    """Return our step with clipping; the norm of the gradients is far above the limit."""
    parameters = problem.parameters()
    return npp.NAdam(parameters, decoupled_weight_decay=True, weight_decay=0.01, max_grad_norm=1.0).step


def torch_nadam_compiled(problem: Problem) -> Step:
    """Return the foreach step under torch.compile; its first call compiles for seconds and should not be measured."""
    optimizer = torch.optim.NAdam(problem.parameters(), foreach=True, decoupled_weight_decay=True, weight_decay=0.01)
    return torch.compile(optimizer.step)


def torch_clip_and_nadam(problem: Problem) -> Step:
    """Return ``clip_grad_norm_`` and the foreach step, with gradients of their own, since clipping rewrites them."""
    parameters = problem.parameters()
    for p, g in zip(parameters, problem.grads, strict=True):
        p.grad = g.clone()
    optimizer = torch.optim.NAdam(parameters, foreach=True, decoupled_weight_decay=True, weight_decay=0.01)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()

    return step


def plain_loop(problem: Problem) -> Step:
    """Return a C++ loop that reads p, g, m, v and writes p, m, v, in memory of the same kind as our moments."""
    weights = [p.detach() for p in problem.parameters()]
    state = [npp.kernels.zeros_like(weights, [w.dtype for w in weights]) for _ in range(2)]
    return plain.seven_streams([weights, problem.grads, *state])


def plain_read(problem: Problem) -> Step:
    """Return a C++ loop that reads every gradient once."""
    return plain.read_once(problem.grads)


PEERS: dict[str, Callable[[Problem], Step]] = {
    "nesterov_pp.NAdam": ours,
    "nesterov_pp.NAdam, ring of 2": lambda problem: ours_with_ring(problem, 2),
    "nesterov_pp.NAdam, ring of 8": lambda problem: ours_with_ring(problem, 8),
    "nesterov_pp.NAdam(max_grad_norm=1.0)": ours_clipping,
    "torch.optim.NAdam(foreach=True)": torch_nadam,
    "clip_grad_norm_ + torch.optim.NAdam(foreach=True)": torch_clip_and_nadam,
    "torch.optim.NAdam(foreach=True) + stash by copies": torch_nadam_with_stash,
    "torch.optim.AdamW(fused=True)": torch_adamw_fused,
}

# Not for every list: compiling for 1,000 tensors takes minutes, and the plain loops take float32 only.
MORE_PEERS: dict[str, Callable[[Problem], Step]] = {
    "torch.optim.NAdam(foreach=True) under torch.compile": torch_nadam_compiled,
    "plain C++ loop, 7 streams": plain_loop,
    "plain C++ loop, reads g": plain_read,
}


def prepare(step: Step) -> None:
    """Do what a peer needs before each step, outside the measurement."""
    getattr(step, "prepare", lambda: None)()


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
