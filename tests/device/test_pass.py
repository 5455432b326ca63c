"""The pass of the CUDA threads, run on the host: chunks, tails, alignment, dtypes, slots, rounding."""

from __future__ import annotations

import ctypes
import itertools
import random
import re
import shutil
from typing import Any

import on_host
import pytest
import torch
from on_host import (
    ALIGNED,
    EXP_AVG,
    EXP_AVG_SQ,
    GRAD,
    MASTER,
    MEAN,
    NUMEL,
    ROOT,
    ROW,
    SHADOW,
    SLOTS,
    SMALL,
    Table,
)
from on_host import DTYPES as CODES

from nesterov_pp.kernels import (
    Coefficients,
    Correction,
    CorrectionKind,
    Normaliser,
    StepSlots,
    Tensors,
    extension,
    make_plan,
)
from nesterov_pp.kernels.scalars import HAS_MEAN

MISSING = extension.load()[1] or (None if shutil.which("c++") else "there is no C++ compiler")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
C = Coefficients(0.5, 0.1, 0.1, 0.01, 0.02, 0.3, 0.7, 1.5, 1e-8)
X = Correction(0.4, 0.1, 1.3, 1e-6, 0.7, 0.3, 0.2)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [
    (F32, F32, F32),
    (F32, F32, BF16),
    (F64, F64, F64),
    (BF16, BF16, BF16),
    (BF16, BF16, F32),
    (F16, F16, F16),
    (F16, F16, BF16),
    (F16, F16, F32),
    (F32, BF16, F32),
    (F32, BF16, BF16),
    (F32, F16, F32),
    (F32, F16, BF16),
]
SIZES = [0, 1, 2, 3, 7, 8, 9, 31, 1000, 16384, 16385, 40_003]


def rows(*coefficients: Coefficients, step: int = 1, correction: Correction | None = None) -> torch.Tensor:
    return torch.tensor([[*c, step, *(correction or ())] for c in coefficients], dtype=F64)


def drawn(n: int, dtype: torch.dtype, generator: torch.Generator, offset: int = 0) -> torch.Tensor:
    """Draw random values at an address ``offset`` elements beyond an aligned one."""
    base = torch.randn(n + offset, generator=generator, dtype=F64).to(dtype)
    return base[offset:]


class Problem:
    """The tensors of a step: the table for the device pass, and copies for the cpu backend.

    Args:
        kind: the kind of correction; None for a plain step.
        shadows: whether the ring has a shadow.
        ring_predicts: whether the ring takes the predictions.
    """

    def __init__(
        self,
        lib: ctypes.CDLL,
        dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
        sizes: list[int],
        *,
        slots: int = 1,
        offset: int = 0,
        normaliser: Normaliser = Normaliser.RMS,
        kind: CorrectionKind | None = None,
        shadows: bool = False,
        ring_predicts: bool = False,
    ) -> None:
        weight, grad, moment = dtypes
        self.dtypes, self.normaliser, self.kind, self.ring_predicts = dtypes, normaliser, kind, ring_predicts
        generator = torch.Generator().manual_seed(len(sizes))

        def draw(dtype: torch.dtype) -> list[torch.Tensor]:
            return [drawn(n, dtype, generator, offset) for n in sizes]

        self.slots = [draw(grad) for _ in range(slots)]
        self.grads, self.m, self.v = draw(grad), draw(moment), [v.abs() for v in draw(moment)]
        self.masters = [w.to(F32) for w in self.slots[0]] if weight != grad else [None] * len(sizes)
        self.means = [v.abs() for v in draw(moment)] if kind in HAS_MEAN else []
        self.shadows = draw(grad) if shadows else []
        self.table = Table(lib, sizes, slots)
        for i in range(len(sizes)):
            self.enter(i)

    def enter(self, i: int, row: int = 0) -> None:
        columns = {GRAD: self.grads[i], EXP_AVG: self.m[i], EXP_AVG_SQ: self.v[i], MASTER: self.masters[i]}
        columns |= {MEAN: self.means[i] if self.means else None, SHADOW: self.shadows[i] if self.shadows else None}
        self.table.hold(i, columns, [slot[i] for slot in self.slots], row=row)

    def step(self, rows: torch.Tensor, slots: tuple[int, int, int] = (0, 0, 0), **options: Any) -> None:
        self.table.step(
            self.dtypes,
            rows,
            slots,
            normaliser=int(self.normaliser),
            kind=None if self.kind is None else int(self.kind),
            ring_predicts=self.ring_predicts,
            **options,
        )

    def left(self) -> dict[str, list[torch.Tensor]]:
        """Return all tensors that a step writes."""
        masters = [t for t in self.masters if t is not None]
        ring = {f"slot {k}": slot for k, slot in enumerate(self.slots)}
        return {**ring, "m": self.m, "v": self.v, "masters": masters, "means": self.means, "shadows": self.shadows}

    def expected(
        self, slots: tuple[int, int, int] = (0, 0, 0), *, seed: int | None = None, c: Coefficients = C
    ) -> dict[str, list[torch.Tensor]]:
        """Return copies of these tensors after a step of the cpu backend."""
        count = len(self.m)

        def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            return [t.clone() for t in tensors]

        ring = [[torch.nn.Parameter(w.clone()) for w in slot] for slot in self.slots]
        for p, grad in zip(ring[slots[0]], self.grads, strict=True):
            p.grad = grad.clone()
        tensors = Tensors(
            names=[str(i) for i in range(count)],
            numbers=list(range(count)),
            groups=[0] * count,
            slots=ring,
            exp_avgs=copies(self.m),
            exp_avg_sqs=copies(self.v) if self.normaliser == Normaliser.RMS else [],
            masters=[None if t is None else t.clone() for t in self.masters],
            steps=[torch.zeros(()) for _ in range(count)],
            mu_products=[],
            max_exp_avg_sqs=[],
            normaliser=self.normaliser,
            kind=self.kind or CorrectionKind.NONE,
            means=copies(self.means),
            shadows=copies(self.shadows),
            ring_predicts=self.ring_predicts,
        )
        plan = make_plan("cpu", tensors, seed)
        plan.collect(StepSlots(*slots))
        plan.apply([c], [1.0], [X] if tensors.corrects else [])
        masters = [t for t in tensors.masters if t is not None]
        return {
            **{f"slot {k}": [p.detach() for p in slot] for k, slot in enumerate(ring)},
            "m": tensors.exp_avgs,
            "v": tensors.exp_avg_sqs or self.v,
            "masters": masters,
            "means": tensors.means,
            "shadows": tensors.shadows,
        }


def assert_as_expected(problem: Problem, expected: dict[str, list[torch.Tensor]]) -> None:
    """Compare bit for bit: both sides use the same arithmetic."""
    for name, found in problem.left().items():
        for i, (a, b) in enumerate(zip(found, expected[name], strict=True)):
            assert torch.equal(a, b), f"{name} of tensor {i}, {a.numel()} elements"


def test_there_is_a_pass_for_what_the_backends_promise(lib):
    for codes in itertools.product(CODES.values(), repeat=3):
        dtypes = tuple(next(d for d, code in CODES.items() if code == k) for k in codes)
        for normaliser, corrects in itertools.product(Normaliser, (0, 1)):
            nearest, stochastic = (lib.is_supported(*codes, int(normaliser), corrects, s) for s in (0, 1))
            there_is_one = dtypes in DTYPES or (dtypes in SMALL and not corrects)
            assert nearest == there_is_one
            assert stochastic == (there_is_one and F16 not in (dtypes[0], dtypes[2]))


def test_python_and_triton_count_as_the_table_does():
    text = (ROOT / "csrc/device/table.h").read_text()
    columns = re.findall(r"^  k(\w+),", text[text.index("enum Column") :], re.MULTILINE)
    for k, name in enumerate(columns):
        words = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()
        assert getattr(on_host, words) == k
        triton = (ROOT / "triton_kernels/kernels.py").read_text()
        assert f"\n_{words} = tl.constexpr({k})\n" in triton
    assert [name for name in columns if name != "Slots"] == [
        "".join(part.capitalize() for part in name.split("_")) for name in on_host.COLUMNS
    ]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("normaliser", Normaliser)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_step_has_the_bits_of_the_cpu_backend(lib, dtypes, normaliser, offset):
    problem = Problem(lib, dtypes, SIZES, normaliser=normaliser, offset=offset)
    expected = problem.expected()
    problem.step(rows(C))
    assert_as_expected(problem, expected)


# Where predictions go: nowhere, into the shadow, or into the ring while the shadow is stepped.
WAYS = [
    {"ring_predicts": True, "shadows": True},
    {"shadows": True, "offset": 1},
    {"offset": 1},
    {"ring_predicts": True, "shadows": True, "seed": 7},
    {"shadows": True, "seed": 8},
]


@pytest.mark.parametrize(
    ("dtypes", "normaliser", "kind", "way"),
    [
        (d, n, kind, WAYS[(i + 2 * j + k) % len(WAYS)])
        for i, d in enumerate(DTYPES)
        for j, n in enumerate(Normaliser)
        for k, kind in enumerate(CorrectionKind)
    ],
    ids=str,
)
def test_a_corrected_step_has_the_bits_of_the_cpu_backend(lib, dtypes, normaliser, kind, way):
    """Test every kind in every dtype; the newest version of the ring overwrites the oldest."""
    way = dict(way)
    seed = way.pop("seed", None)
    if F16 in (dtypes[0], dtypes[2]):
        seed = None
    if kind == CorrectionKind.NONE:
        way["shadows"] = True
    problem = Problem(lib, dtypes, [0, 1, 3, 8, 31, 1000, 16_385], slots=3, normaliser=normaliser, kind=kind, **way)
    expected = problem.expected((2, 1, 2), seed=seed)
    problem.step(rows(C, correction=X), (2, 1, 2), seed=seed)
    assert_as_expected(problem, expected)


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, F32), (F32, BF16, F32)], ids=str)
def test_a_ring_step_reads_one_slot_and_writes_the_next(lib, dtypes):
    problem = Problem(lib, dtypes, SIZES, slots=4)
    before = [[w.clone() for w in slot] for slot in problem.slots]
    expected = problem.expected((2, 2, 3))
    problem.step(rows(C), (2, 2, 3))
    assert_as_expected(problem, expected)
    for slot in (0, 1, 2):
        assert all(torch.equal(a, b) for a, b in zip(problem.slots[slot], before[slot], strict=True))


@pytest.mark.parametrize("target", [0, 1])
def test_a_tensor_without_gradient_is_carried_over(lib, target):
    problem = Problem(lib, (F32, F32, F32), SIZES, slots=2)
    expected = problem.expected((0, 0, target))
    for i in range(1, len(SIZES), 2):
        problem.enter(i, row=-1)
        problem.table.set(GRAD, i, 0)
        expected[f"slot {target}"][i].copy_(problem.slots[0][i])
        expected["m"][i].copy_(problem.m[i])
        expected["v"][i].copy_(problem.v[i])
    problem.step(rows(C), (0, 0, target))
    assert_as_expected(problem, expected)


def test_every_tensor_takes_its_row(lib):
    other = C._replace(c_grad=0.05, decay=0.0)
    problem = Problem(lib, (F32, F32, F32), SIZES)
    first, second = (problem.expected(c=c) for c in (C, other))
    for i in range(len(SIZES)):
        problem.enter(i, row=i % 2)
    problem.step(rows(C, other))
    expected = {
        name: [b if i % 2 else a for i, (a, b) in enumerate(zip(first[name], second[name], strict=True))]
        for name in first
    }
    assert_as_expected(problem, expected)


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize(
    "dtypes", [(BF16, BF16, BF16), (BF16, BF16, F32), (F32, F32, BF16), (F32, BF16, BF16)], ids=str
)
def test_stochastic_rounding_takes_the_bits_of_every_backend(lib, dtypes, offset):
    problem = Problem(lib, dtypes, SIZES, offset=offset)
    expected = problem.expected(seed=(1 << 40) + 5)
    problem.step(rows(C), seed=(1 << 40) + 5)
    assert_as_expected(problem, expected)


@pytest.mark.parametrize("seed", [None, 11])
@pytest.mark.parametrize("kind", [None, CorrectionKind.GAP, CorrectionKind.DISCREPANCY])
@pytest.mark.parametrize("normaliser", list(Normaliser))
@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (F32, BF16, BF16)], ids=str)
def test_what_is_not_finite_is_as_on_the_cpu(lib, dtypes, normaliser, kind, seed):
    """An infinite moment and a finite gradient make a moment NaN whose sign was finite: it stays NaN when rounded."""
    problem = Problem(lib, dtypes, [1000, 31, 7], slots=2, normaliser=normaliser, kind=kind, shadows=kind is not None)
    inf = float("inf")
    strange = torch.tensor([0.0, -0.0, inf, -inf, float("nan"), 1e30, -1e-30, 0.5])
    generator = torch.Generator().manual_seed(4)
    masters = [t for t in problem.masters if t is not None]
    signed, squares = [*problem.slots, problem.grads, problem.m, masters], [problem.v, problem.means]
    for t in (t for tensors in signed + squares for t in tensors):
        drawn = strange[torch.randint(len(strange), t.shape, generator=generator)]
        t[torch.rand(t.shape, generator=generator) < 0.3] = 0.5
        t.copy_(torch.where(torch.rand(t.shape, generator=generator) < 0.3, drawn.to(t.dtype), t))
    for t in (t for tensors in squares for t in tensors):
        t.abs_()
    expected = problem.expected((0, 0, 1), seed=seed)
    problem.step(rows(C, correction=None if kind is None else X), (0, 0, 1), seed=seed)
    for name, tensors in problem.left().items():
        for ours, theirs in zip(tensors, expected[name], strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan()), name
            torch.testing.assert_close(ours, theirs, rtol=0.0, atol=0.0, equal_nan=True)


def test_the_factor(lib):
    problem = Problem(lib, (F32, F32, F32), SIZES)
    expected = problem.expected(c=C._replace(grad_scale=C.grad_scale * 0.25))
    problem.step(rows(C), factor=0.25)
    assert_as_expected(problem, expected)


@pytest.mark.parametrize(("limit", "loss_scale"), [(0.0, 1.0), (0.0, 1024.0), (1.0, 1.0), (1.0, 512.0), (100.0, 8.0)])
def test_the_clipping_factor_is_torchs(lib, limit, loss_scale):
    norm = 3.5
    clipped = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
    args = [torch.tensor(x, dtype=F64).item() for x in (norm, limit, loss_scale)]
    assert lib.clipping_factor(*map(ctypes.c_double, args)) == clipped / loss_scale
    nan = lib.clipping_factor(*map(ctypes.c_double, (float("nan"), 1.0, 1.0)))
    assert nan != nan


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("offset", [0, 1])
def test_sums_of_squares(lib, dtype, offset):
    problem = Problem(lib, (F32 if dtype != F64 else F64, dtype, F32 if dtype != F64 else F64), SIZES, offset=offset)
    total = 0.0
    for chunk in problem.table.chunks():
        total += lib.squares_on_host(
            problem.table.data, ctypes.c_int64(len(SIZES)), ctypes.c_int64(chunk), CODES[dtype], ctypes.c_int64(256)
        )
    wanted = sum(float(g.double().square().sum()) for g in problem.grads)
    assert total == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("threads", [1, 3, 32, 1024])
def test_the_number_of_threads_changes_nothing(lib, threads):
    results = []
    for number in (5, threads):
        problem = Problem(lib, (F32, F32, F32), SIZES)
        problem.step(rows(C), threads=number)
        results.append([*problem.slots[0], *problem.m, *problem.v])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_spans_cover_every_element_once(lib):
    draw = random.Random(0)
    chunk = lib.chunk_elements()
    for _ in range(200):
        sizes = [
            draw.choice([0, 1, draw.randrange(100), draw.randrange(5 * chunk), chunk, 3 * chunk, chunk + 1])
            for _ in range(draw.randrange(1, 40))
        ]
        table = Table(lib, sizes, 1)
        seen: dict[int, int] = dict.fromkeys(range(len(sizes)), 0)
        for tensor, begin, count in table.spans():
            assert begin == seen[tensor]
            assert 0 < count <= chunk
            seen[tensor] += count
        assert list(seen.values()) == sizes


def test_sizes_beyond_32_bits(lib):
    size = (1 << 33) + 12_345
    table = Table(lib, [5, size], 1)
    spans = table.spans()
    assert spans[0] == (0, 0, 5)
    assert sum(count for tensor, _, count in spans if tensor == 1) == size
    assert spans[-1][1] + spans[-1][2] == size


def test_only_what_changed_is_sent(lib):
    table = Table(lib, [4, 5, 6], 2)
    assert table.changed() == (0, (SLOTS + 2) * 3)
    table.sent()
    assert table.changed() == (0, 0)
    table.set(NUMEL, 1, 5)
    assert table.changed() == (0, 0)
    table.set(GRAD, 2, 4096)
    table.set(ROW, 1, 7)
    assert table.changed() == (ROW * 3 + 1, GRAD * 3 + 3)
    table.set(ALIGNED, 0, 1)
    assert table.changed() == (ROW * 3 + 1, ALIGNED * 3 + 1)
    table.sent()
    table.set(SLOTS + 1, 0, 8)
    assert table.changed() == ((SLOTS + 1) * 3, (SLOTS + 1) * 3 + 1)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_value_of_two_bytes_is_converted_as_torch_does(lib, dtype):
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    found = torch.empty(65536)
    lib.widen_all(CODES[dtype], ctypes.c_void_p(found.data_ptr()))
    assert torch.equal(found.nan_to_num(nan=7.0), values.float().nan_to_num(nan=7.0))
    assert torch.equal(found.isnan(), values.isnan())
    wide = values.float()
    near = torch.cat([wide, wide.nextafter(torch.tensor(1e30)), wide * 1.0009765625, wide * 1.001953125, wide * 1.0029])
    narrow = torch.empty(len(near), dtype=torch.int16)
    lib.narrow_all(
        CODES[dtype], ctypes.c_void_p(near.data_ptr()), ctypes.c_int64(len(near)), ctypes.c_void_p(narrow.data_ptr())
    )
    got, wanted = narrow.view(dtype), near.to(dtype)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(nan=0.0).view(torch.int16), wanted.nan_to_num(nan=0.0).view(torch.int16))


def test_corrected_estimates_are_the_nearest_roots_and_quotients(lib):
    """Test the whole range that the kernels use, and the hardest significands: squares of midpoints between neighbours,
    and quotients of neighbours."""
    generator = torch.Generator().manual_seed(0)

    def drawn(low: int, high: int) -> torch.Tensor:
        exponents = torch.randint(low, high, (400_000,), generator=generator)
        significands = 1.0 + torch.rand(400_000, generator=generator, dtype=F64)
        significands[::3] = 1.0 + torch.randint(0, 1 << 12, significands[::3].shape, generator=generator) * 2.0**-12
        significands[1::3] = 2.0 - torch.randint(1, 64, significands[1::3].shape, generator=generator) * 2.0**-23
        return torch.ldexp(significands, exponents).float()

    def pointer(t: torch.Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(t.data_ptr())

    squares, momenta, divisors = drawn(-100, 20), drawn(-100, 128), drawn(-50, 21)
    momenta[::100] = 0.0
    hard = (drawn(-50, 10).double() + drawn(-74, -73).double()).square().float()
    count = ctypes.c_int64(len(squares))
    for off in (-2, -1, 0, 1, 2):
        assert lib.wrong_roots(pointer(squares), count, off) == 0
        assert lib.wrong_roots(pointer(hard), count, off) == 0
    for off in (-1, 0, 1):
        assert lib.wrong_quotients(pointer(momenta), pointer(divisors), count, off) == 0
        assert lib.wrong_quotients(pointer(-momenta), pointer(divisors), count, off) == 0
    assert lib.wrong_quotients(pointer(momenta), pointer(divisors), count, 1 << 14) > 0
