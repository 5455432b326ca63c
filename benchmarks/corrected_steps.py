"""Counts the instructions of corrected steps, for one kind of correction at a time.

A corrected kernel has all kinds in it and runs one of them, so its main loop says nothing about a step. Here the rule
is a constant of each kernel, and the compiler leaves out the others.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from benchmarks.main_loop import SLOTS_PER_BYTE, code_of, main_loop
from nesterov_pp.kernels.scalars import HAS_MEAN, CorrectionKind

DTYPES = {
    "float32": "float, float, float, Form::kCorrected, false",
    "bfloat16": "BFloat16, BFloat16, BFloat16, Form::kCorrected, false",
    "bfloat16, stochastic rounding": "BFloat16, BFloat16, BFloat16, Form::kCorrected, true",
}
MOST = {"float32": 0.45, "bfloat16": 0.85, "bfloat16, stochastic rounding": 1.05}
"""Shares of the issue slots that no kind may exceed."""

# What recipes use: a prediction alone or with a discrepancy, and corrections of gradients with and without one.
USES = [(kind, True) for kind in CorrectionKind] + [
    (kind, False) for kind in CorrectionKind if kind not in (CorrectionKind.NONE, CorrectionKind.DISCREPANCY)
]

_SOURCE = """
#include "device/pass.h"

namespace nesterov_pp {

template <class P, int kind, bool predicts>
__global__ void __launch_bounds__(256, 2) step_kernel(const __grid_constant__ device::Launch launch) {
  device::Launch l = launch;
  l.rule = {Normaliser::kRms, static_cast<CorrectionKind>(kind), predicts};
  device::step<P>(l, blockIdx.x, threadIdx.x, 256);
}

INSTANCES
}  // namespace nesterov_pp
"""


class Use(NamedTuple):
    """One kind of correction in one dtype: instructions and bytes per parameter."""

    dtypes: str
    kind: CorrectionKind
    predicts: bool
    instructions: float
    bytes: int

    @property
    def share(self) -> float:
        """The share of an H200's issue slots that the main loop uses."""
        return self.instructions / (SLOTS_PER_BYTE * self.bytes)

    @property
    def name(self) -> str:
        """The dtypes, the correction and whether a weight is predicted."""
        kind = self.kind.name.lower().replace("_", " ")
        correction = "no correction" if self.kind == CorrectionKind.NONE else kind
        return f"{self.dtypes}: {correction}{', prediction' if self.predicts else ''}"


def source() -> str:
    """Return a CUDA source with a kernel for each use and dtype."""
    lines = [
        f"template __global__ void step_kernel<Pass<{dtypes}>, {int(kind)}, {str(predicts).lower()}>"
        "(const __grid_constant__ device::Launch);"
        for dtypes in DTYPES.values()
        for kind, predicts in USES
    ]
    return _SOURCE.replace("INSTANCES", "\n".join(lines))


def uses_in(listing: str) -> list[Use]:
    """Return the uses that ``cuobjdump -sass`` has listed, in the order of ``source``."""
    found = {}
    for part in listing.split("Function : ")[1:]:
        mangled = part.split(maxsplit=1)[0]
        names = re.search(r"PassI(.*?)LNS_4FormE3ELb(\d)EEELi(\d)ELb(\d)E", mangled)
        loop = main_loop(code_of(part))
        if names is None or loop is None:
            continue
        stochastic, kind, predicts = (int(names.group(n)) for n in (2, 3, 4))
        dtypes = "float32" if "BFloat16" not in names.group(1) else list(DTYPES)[1 + stochastic]
        size = 4 if dtypes == "float32" else 2
        parameters = loop.bytes // size // _read(CorrectionKind(kind))
        moved = size * (_read(CorrectionKind(kind)) + _written(CorrectionKind(kind), bool(predicts)))
        use = Use(dtypes, CorrectionKind(kind), bool(predicts), loop.instructions / parameters, moved)
        found[use[:3]] = use
    return [found[dtypes, kind, predicts] for dtypes in DTYPES for kind, predicts in USES]


def _read(kind: CorrectionKind) -> int:
    """Return the number of tensors that a step reads: w, g, m and v, the late weights and a running mean."""
    return 4 + (kind not in (CorrectionKind.NONE, CorrectionKind.DISCREPANCY)) + (kind in HAS_MEAN)


def _written(kind: CorrectionKind, predicts: bool) -> int:
    """Return the number of tensors that a step writes: w, m and v, a running mean and a predicted weight."""
    return 3 + (kind in HAS_MEAN) + predicts


def problems(uses: list[Use]) -> list[str]:
    """Return a sentence for each use that takes more of the issue slots than ``MOST``."""
    return [f"{use.name} takes {use.share:.1%} of the issue slots" for use in uses if use.share > MOST[use.dtypes]]


def table(uses: list[Use]) -> str:
    """Return a Markdown table with one row per use."""
    lines = ["| corrected step (sm_90) | bytes | instructions | share |", "|---|--:|--:|--:|"]
    lines += [f"| {use.name} | {use.bytes} | {use.instructions:.1f} | {use.share:.0%} |" for use in uses]
    return "\n".join(lines)


def write_source(folder: Path) -> Path:
    """Write the CUDA source into ``folder`` and return its path."""
    path = folder / "corrected_steps.cu"
    path.write_text(source())
    return path
