"""The rows measured on a device: lists of parameters, our optimizers with their options, and their peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import nesterov_pp as npp
from benchmarks import workloads as w

FLOAT, HALF = torch.float32, torch.bfloat16
DEVICE_BACKENDS = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
TAKE_SMALL = ("cuda", "triton")
"""The backends whose steps in small formats are measured here; ``benchmarks.small_state`` measures those of the cpu."""


def gpt_1b() -> w.Shapes:
    """Return the shapes of 292 tensors, 1.0B parameters: 24 blocks of width 1,792."""
    width = 1792
    wide = {768: width, 4 * 768: 4 * width, 3 * 768: 3 * width}
    embeddings, block, norm = w.gpt2_small()[:2], w.gpt2_small()[2:14], w.gpt2_small()[-2:]
    return [tuple(wide.get(n, n) for n in shape) for shape in [*embeddings, *block * 24, *norm]]


def odd_shapes() -> w.Shapes:
    """Return the shapes of 96 tensors, 50M parameters, with hardly a size that is a multiple of anything."""
    return [(1,), (3,), (127,), (3, 5, 7, 11), (4099, 3), (997, 1009), (1_000_003,), (2_097_143,)] * 12


WORKLOADS: dict[str, Callable[[], w.Shapes]] = {
    "gpt2-small": w.gpt2_small,
    "1b": gpt_1b,
    "one": lambda: [(2**28,)],
    "tiny": lambda: [(1024,)] * 2000,
    "tiny-in-one": lambda: [(1024 * 2000,)],
    "odd": odd_shapes,
    "short": lambda: [(513, 129), (1,), (3, 5, 7), (1024,), (70_001,)],
}


class Problem(w.Problem):
    """A ``benchmarks.workloads.Problem`` on a device, where its random values are made."""

    def __init__(self, shapes: w.Shapes, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.weights = [draw(shape).to(dtype) for shape in shapes]
        self.grads = [(draw(shape) * 1e-2).to(dtype) for shape in shapes]
        self.bytes_per_parameter = w.STREAMS * dtype.itemsize
        self.elements = sum(t.numel() for t in self.weights)
        self.device = device


class Ours:
    """Our step, from one ring slot to the next if there is a ring; ``prepare`` hands over the gradients beforehand."""

    def __init__(self, problem: w.Problem, backend: str, ring: int = 0, **options: Any) -> None:
        parameters = problem.parameters()
        self.stash = npp.WeightStash(nn.ParameterList(parameters), ring) if ring else None
        self.grads = problem.grads
        self.optimizer = npp.NAdam(
            parameters,
            decoupled_weight_decay=True,
            weight_decay=0.01,
            backend=backend,
            stash=self.stash,
            **options,
        )
        for _ in range(ring):
            self.prepare()
            self()

    def prepare(self) -> None:
        if self.stash is not None:
            leaves = self.stash.parameters(self.stash.newest).values()
            for leaf, grad in zip(leaves, self.grads, strict=True):
                leaf.grad = grad

    def __call__(self) -> None:
        self.optimizer.step(version=None if self.stash is None else self.stash.newest)


@dataclass(frozen=True)
class Row:
    """A step to measure, with the bytes per parameter that it must move and those that it holds, approximately."""

    name: str
    build: Callable[[Problem], w.Step]
    bytes: float
    held: float
    dtype: torch.dtype = FLOAT  # of parameters and gradients
    ours: bool = False
    compiled: bool = False


State = torch.dtype | str | None


def moment_size(dtype: torch.dtype, state: State, master: bool | str) -> float:
    """Return the bytes of one moment for each parameter."""
    if isinstance(state, str):
        return 1 + HALF.itemsize / 32  # codes, and a scale for 32 of them
    return (state or (FLOAT if master else dtype)).itemsize


def moved(dtype: torch.dtype, state: State = None, master: bool | str = False, clip: bool = False) -> float:
    """Return the bytes moved per parameter.

    Weights and moments are read and written, and the gradient is read, with ``clip`` once more for its norm. A master
    is read and written instead of its weight, which is a copy; a residual, beside its weight.
    """
    weights = 2 * FLOAT.itemsize + dtype.itemsize if master is True else 2 * dtype.itemsize + 2 * bool(master)
    return weights + 4 * moment_size(dtype, state, master) + dtype.itemsize * (1 + clip)


class Captured:
    """Our step as a CUDA graph."""

    def __init__(self, problem: Problem, backend: str) -> None:
        self._step = Ours(problem, backend, capturable=True)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()

    def __call__(self) -> None:
        self._graph.replay()


def our_rows(backend: str) -> list[Row]:
    def row(note: str, dtype: torch.dtype = FLOAT, ring: int = 0, **options: Any) -> Row:
        state, master = options.get("state_dtype"), options.get("master_weights", False)
        masters = 4 if master is True else bool(master)
        held = dtype.itemsize * max(ring, 1) + 2 * moment_size(dtype, state, master) + masters
        return Row(
            f"nesterov_pp.NAdam, {backend}{note}",
            lambda problem: Ours(problem, backend, ring, **options),
            moved(dtype, state, master, "max_grad_norm" in options),
            held,
            dtype,
            ours=True,
        )

    if backend == "reference":
        return [row("")]
    graph = f"nesterov_pp.NAdam, {backend}, as a CUDA graph"
    captured = [Row(graph, lambda problem: Captured(problem, backend), 28, 12, ours=True)] if backend != "cpu" else []
    small = [
        row(", 8-bit moments", state_dtype="8bit"),
        row(", bfloat16 with 24-bit masters", HALF, master_weights="24bit"),
        row(", bfloat16 with 24-bit masters, 8-bit moments", HALF, master_weights="24bit", state_dtype="8bit"),
    ]
    return [
        row(""),
        row(", ring of 8", ring=8),
        row(", max_grad_norm=1.0", max_grad_norm=1.0),
        row(", bfloat16 moments", state_dtype=HALF),
        row(", bfloat16", HALF),
        row(", bfloat16 with float32 masters", HALF, master_weights=True),
        *(small if backend in TAKE_SMALL else []),
        *captured,
    ]


def torch_nadam_capturable(problem: w.Problem) -> w.Step:
    return _capturable(problem).step


def torch_nadam_compiled(problem: Problem) -> w.Step:
    """Return the compiled step, whose first call compiles for seconds and should not be measured.

    On the CPU nothing is capturable.
    """
    if problem.device.type != "cuda":
        return w.torch_nadam_compiled(problem)
    return torch.compile(_capturable(problem, lr=torch.tensor(2e-3, device=problem.device)).step)


def _capturable(problem: w.Problem, **options: Any) -> torch.optim.NAdam:
    return torch.optim.NAdam(
        problem.parameters(),
        foreach=True,
        decoupled_weight_decay=True,
        weight_decay=0.01,
        capturable=True,
        **options,
    )


def peers() -> list[Row]:
    foreach = "torch.optim.NAdam(foreach=True"
    return [
        Row(f"{foreach})", w.torch_nadam, 28, 12),
        Row(f"{foreach}, capturable=True)", torch_nadam_capturable, 28, 12),
        Row(f"clip_grad_norm_ + {foreach})", w.torch_clip_and_nadam, 32, 16),
        Row(f"{foreach}) + stash by copies", w.torch_nadam_with_stash, 28, 24),
        Row("torch.optim.AdamW(fused=True)", w.torch_adamw_fused, 28, 12),
        Row(f"{foreach}) under torch.compile", torch_nadam_compiled, 28, 12, compiled=True),
    ]
