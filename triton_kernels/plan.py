"""The plan of the triton backend, and the launches of its kernels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_pp.kernels import extension
from nesterov_pp.kernels.capture import captures
from nesterov_pp.kernels.plan import StepClass, StepSlots, Tensors
from nesterov_pp.kernels.scalars import Coefficients, Correction

from . import kernels

_SPLIT = "split"  # weights in 24 bits
_DTYPES = {
    "float": tl.float32,
    "double": tl.float64,
    "bfloat16": tl.bfloat16,
    "half": tl.float16,
    "code": tl.int8,
    _SPLIT: tl.bfloat16,
}
_SUMS = 1024  # elements that the last reduction adds at a time
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Shape:
    """The launch shape of a pass: the same for every step, and never autotuned, since the kernels work in place."""

    block: int
    warps: int
    registers: int | None = None  # limit per thread; None leaves the number to the assembler


# Eight elements per thread: one 16-byte vector of bfloat16, two of float32.
# The interpreter takes as long for many elements as for few.
_WIDER = 4 if triton.knobs.runtime.interpret else 1
# Without a limit the assembler spills registers of a stochastically rounded step; a corrected one needs more than 128.
STEP = Shape(block=256 * _WIDER, warps=1, registers=128)
CODED = Shape(block=256 * _WIDER, warps=1, registers=144)  # a group's largest elements wait for it
CORRECTED = Shape(block=256 * _WIDER, warps=1)
DOUBLE = Shape(block=128 * _WIDER, warps=1)
SQUARES = Shape(block=2048, warps=8)


def shape_of(weight: Any, moment: Any, corrects: bool) -> Shape:
    """Return the launch shape of a step with weights and moments of these dtypes."""
    if weight == tl.float64:  # takes twice the registers
        return DOUBLE
    if moment == tl.int8:
        return CODED
    return CORRECTED if corrects else STEP


class Launches:
    """The launches of the kernels of one plan."""

    def __init__(self, tensors: Tensors, seed: int | None) -> None:
        self.seed = seed
        self.key = tensors.code_seed if seed is None else seed
        self.groups: list[Any] = []
        self.scaling: Tensor | None = None  # norm and factor, for the next step only
        self._rule = {
            "NORMALISER": int(tensors.normaliser),
            "CORRECTS": tensors.corrects,
            "KIND": int(tensors.kind),
            "RING_PREDICTS": tensors.ring_predicts,
        }

    def step(self, rows: Tensor, slots: Sequence[int]) -> None:
        """Launch a kernel for each group of tensors with the same dtypes; ``slots`` is a ``StepSlots``."""
        with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call] # Triton launches on the current device
            for group in self.groups:
                self._step(group, rows, slots)
        self.scaling = None

    def _step(self, group: Any, rows: Tensor, slots: Sequence[int]) -> None:
        weight, grad, moment = (_DTYPES[name] for name in group.dtypes)
        split = group.dtypes[0] == _SPLIT
        stochastic = self.seed is not None and (tl.bfloat16 == moment or (tl.bfloat16 == weight and not split))
        shape = shape_of(weight, moment, bool(self._rule["CORRECTS"]))
        kernels.step_kernel[(group.chunks.numel(), kernels.PARTS)](
            group.table,
            group.chunks,
            rows,
            rows if self.scaling is None else self.scaling[1:],
            group.tensors,
            *slots,
            self.key & _WORD,
            self.key >> 32,
            W=weight,
            G=grad,
            M=moment,
            T=tl.float64 if weight == tl.float64 else tl.float32,
            SPLIT=split,
            **self._rule,
            STOCHASTIC=stochastic,
            SCALED=self.scaling is not None,
            BLOCK=shape.block,
            num_warps=shape.warps,
            maxnreg=shape.registers,
            enable_fp_fusion=False,
        )

    def reduce(self, scale: float, limit: float, grad_scale: Tensor | None, *, norm: bool = True) -> Tensor:
        """Return the norm times ``scale`` over the loss scale, and the factor for the next step, in float64."""
        with torch.cuda.device_of(self.groups[0].table):  # type: ignore[no-untyped-call]
            return self._reduce(scale, limit, grad_scale, norm=norm)

    def _reduce(self, scale: float, limit: float, grad_scale: Tensor | None, *, norm: bool) -> Tensor:
        device = self.groups[0].table.device
        counts = [group.chunks.numel() if norm else 0 for group in self.groups]
        partials = torch.empty(max(1, sum(counts)), dtype=torch.float64, device=device)
        for group, first, count in zip(self.groups, itertools.accumulate([0, *counts]), counts, strict=False):
            if count == 0:
                continue
            grad = _DTYPES[group.dtypes[1]]
            kernels.squares_kernel[(count,)](
                group.table,
                group.chunks,
                partials[first:],
                group.tensors,
                G=grad,
                T=tl.float64 if grad == tl.float64 else tl.float32,
                BLOCK=SQUARES.block,
                num_warps=SQUARES.warps,
                enable_fp_fusion=False,
            )
        result = torch.empty(2, dtype=torch.float64, device=device)
        # Filled on the device: the source of a copy from the host would have to live as long as a graph is replayed.
        numbers = torch.full((2,), scale, dtype=torch.float64, device=device)
        numbers[1:].fill_(limit)
        kernels.scaling_kernel[(1,)](
            partials,
            sum(counts),
            numbers,
            numbers[1:],
            numbers if grad_scale is None else grad_scale,
            result,
            UNSCALES=grad_scale is not None,
            BLOCK=_SUMS,
            num_warps=4,
            enable_fp_fusion=False,
        )
        return result


class TritonPlan:
    """The plan of the triton backend (``nesterov_pp.kernels.plan.Plan``)."""

    on_device = True

    def __init__(self, tensors: Tensors, seed: int | None = None) -> None:
        module = extension.require()
        # The plan keeps the launches and not the other way round, so that C++ holds no reference to the Python plan.
        self._launches = Launches(tensors, seed)
        self._plan = module.DevicePlan(
            tensors=extension.tensors_of(module, tensors), seed=seed, launch=self._launches.step, captures=captures
        )

    def collect(self, slots: StepSlots) -> list[StepClass]:
        self._launches.scaling = None
        classes: list[StepClass] = self._plan.collect(slots)
        # Read at every step, since a step that is captured in a graph has tables of its own.
        self._launches.groups = [group for group in self._plan.launches() if group.chunks.numel()]
        return classes

    @property
    def steps_run(self) -> int:
        return int(self._plan.steps_run)

    def forget(self) -> None:
        self._plan.forget()

    def gradient_norm(self) -> float:
        return float(self._launches.reduce(1.0, 0.0, None)[0]) if self._launches.groups else 0.0

    def nonfinite_parameter(self) -> str:
        return str(self._plan.nonfinite_parameter())

    def scale(self, scale: float, limit: float | None, grad_scale: Tensor | None) -> Tensor | None:
        if not self._launches.groups:
            return None if limit is None else torch.zeros((), dtype=torch.float64, device="cpu")
        scaling = self._launches.reduce(scale, limit or 0.0, grad_scale, norm=limit is not None)
        self._launches.scaling = scaling
        return None if limit is None else scaling[0]

    def apply(
        self, rows: Sequence[Coefficients], mu_products: Sequence[float], corrections: Sequence[Correction] = ()
    ) -> None:
        self._plan.apply(rows, mu_products, corrections)

    def apply_rows(self, rows: Tensor) -> None:
        self._plan.apply_rows(rows)


def interpreting() -> bool:
    """Return whether Triton runs its kernels in Python, which also works on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)
