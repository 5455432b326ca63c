"""The corrected pass that CUDA threads run, on the host, beside the cpu backend: bit for bit."""

from __future__ import annotations

import shutil

import pytest
import torch
from on_host import BESIDE, EXP_AVG, EXP_AVG_SQ, GRAD, MASTER, MEAN, Table

from nesterov_pp.kernels import Coefficients, Correction, Kind, Tensors, extension, make_plan
from nesterov_pp.kernels.corrections import HAS_MEAN

MISSING = extension.load()[1] or (None if shutil.which("c++") else "there is no C++ compiler")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
C = Coefficients(0.5, 0.1, 0.1, 0.01, 0.02, 0.3, 0.7, 1.5, 1e-8)
X = Correction(0.4, 0.1, 1.3, 1e-6, 0.7, 0.3, 0.2)
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
DTYPES = [(F32, F32), (F32, BF16), (F64, F64), (BF16, BF16), (BF16, F32)]
SIZES = [0, 1, 3, 8, 31, 1000, 16_385, 40_003]
SOURCE, TARGET, LATE = 1, 2, 2  # the oldest version makes room for the newest


# Every kind in every dtype; where predictions go and where tensors begin, in turn.
WAYS = [("stepped", True, 0), ("beside", False, 1), ("ring", True, 1), ("stepped", False, 0)]


@pytest.mark.parametrize(
    ("dtypes", "kind", "where", "adaptive", "offset"),
    [(d, kind, *WAYS[(i + k + j) % 4]) for i, d in enumerate(DTYPES) for k, kind in enumerate(Kind) for j in (0, 1)],
    ids=str,
)
def test_the_bits_are_those_of_the_cpu_backend(lib, dtypes, kind, adaptive, offset, where):
    """``where``: what is predicted goes nowhere, to a copy beside the ring, or to the ring while a copy is stepped."""
    weight, moment = dtypes
    generator = torch.Generator().manual_seed(0)

    def draw(dtype: torch.dtype) -> list[torch.Tensor]:
        values = (torch.randn(n + offset, generator=generator, dtype=F64).to(dtype) for n in SIZES)
        return [t[offset:] for t in values]

    slots, grads = [draw(weight) for _ in range(3)], draw(weight)
    m, v, mean = draw(moment), [t.abs() for t in draw(moment)], [t.abs() for t in draw(moment)]
    extra = draw(weight)
    stepped, beside = (extra if where == kind_of else None for kind_of in ("stepped", "beside"))
    without = [3, 6]  # have no gradient

    table = Table(lib, SIZES, 3)
    for i in range(len(SIZES)):
        columns = {GRAD: grads[i], EXP_AVG: m[i], EXP_AVG_SQ: v[i], MEAN: mean[i] if kind in HAS_MEAN else None}
        columns |= {MASTER: stepped[i] if stepped else None, BESIDE: beside[i] if beside else None}
        table.hold(i, columns, [slot[i] for slot in slots], row=-1 if i in without else 0)

    def copies(tensors: list[torch.Tensor] | None) -> list[torch.Tensor]:
        return [t.clone() for t in tensors or []]

    wanted = {
        "m": copies(m),
        "v": copies(v),
        "mean": copies(mean),
        "stepped": copies(stepped),
        "beside": copies(beside),
    }
    ring = [[torch.nn.Parameter(w.clone()) for w in slot] for slot in slots]
    for i, p in enumerate(ring[LATE]):
        p.grad = None if i in without else grads[i].clone()
    count = len(SIZES)
    tensors = Tensors(
        names=[str(i) for i in range(count)],
        numbers=list(range(count)),
        groups=[0] * count,
        slots=ring,
        exp_avgs=wanted["m"],
        exp_avg_sqs=wanted["v"] if adaptive else [],
        masters=wanted["stepped"] or [None] * count,
        steps=[torch.zeros(()) for _ in range(count)],
        mu_products=[],
        max_exp_avg_sqs=[],
        kind=kind,
        predicts=True,
        means=wanted["mean"] if kind in HAS_MEAN else [],
        besides=wanted["beside"],
    )
    plan = make_plan("cpu", tensors)
    plan.collect(LATE, SOURCE, TARGET)
    plan.apply([C], [1.0], [X])

    rows = torch.tensor([[*C, 1.0, *X]], dtype=F64)
    table.corrected_step(dtypes, rows, int(kind), source=SOURCE, target=TARGET, late=LATE, adaptive=adaptive)
    found = {"m": m, "v": v, "mean": mean, "stepped": stepped or [], "beside": beside or []}
    for k, slot in enumerate(slots):
        found[f"slot {k}"], wanted[f"slot {k}"] = slot, [p.detach() for p in ring[k]]
    for name, tensors_found in found.items():
        for i, (a, b) in enumerate(zip(tensors_found, wanted[name], strict=True)):
            assert torch.equal(a, b), f"{name} of tensor {i}, {a.numel()} elements"
