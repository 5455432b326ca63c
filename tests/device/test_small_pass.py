"""The pass of the CUDA threads over moments in eight bits and weights in 24, run on the host."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Sequence

import on_host
import pytest
import torch
from on_host import CODE, SMALL, SPLIT, Table
from torch import Tensor

from nesterov_pp.kernels import Coefficients, Normaliser, StepSlots, Tensors, extension, make_plan
from nesterov_pp.kernels.codes import encode_first, encode_second, split

MISSING = extension.load()[1] or (None if shutil.which("c++") else "there is no C++ compiler")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
C = Coefficients(0.5, 0.0, 0.01, 0.001, 0.02, 0.03, 0.07, 1.5, 1e-8)
UNUSUAL = C._replace(l2=0.1, decay=0.0, beta1_complement=0.7)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BOTH = (SPLIT, BF16, CODE)
SIZES = [*range(101), 1000, 16384, 16385, 40_003]
SEED = (1 << 63) + 5


class Problem:
    """The tensors of a step in one format; every list runs over the tensors."""

    def __init__(
        self,
        formats: tuple,
        sizes: Sequence[int],
        *,
        slots: int = 1,
        offset: int = 0,
        rule: Normaliser = Normaliser.RMS,
    ) -> None:
        self.formats, self.sizes, self.rule = formats, list(sizes), rule
        weight, grad, moment = formats
        generator = torch.Generator().manual_seed(len(self.sizes))

        def at_offset(t: Tensor) -> Tensor:
            return torch.cat([t.new_zeros(offset), t])[offset:]

        def draw(n: int) -> Tensor:
            return torch.randn(n, generator=generator)

        ring = [[at_offset(draw(n).to(grad)) for n in sizes] for _ in range(slots)]
        grads = [at_offset((draw(n) * draw(n).exp()).to(grad)) for n in sizes]
        m, v = [draw(n) * 1e-3 for n in sizes], [(draw(n) * 1e-2).square() for n in sizes]
        self.lists: dict[str, list[Tensor | None]] = {f"slot {k}": slot for k, slot in enumerate(ring)}
        self.grads, self.slots = grads, slots
        coded = moment == CODE
        first, second = map(encode_first, m), (encode_second(x.sqrt()) for x in v)
        pairs = [("m", "m scale", list(first), m), ("v", "v scale", list(second), v)]
        for name, scale, codes, wide in pairs[: 1 + (rule == Normaliser.RMS)]:
            self.lists[name] = [at_offset(c.codes) for c in codes] if coded else [at_offset(x.to(moment)) for x in wide]
            if coded:
                self.lists[scale] = [c.scales for c in codes]
        if weight == SPLIT:
            self.lists["residual"] = [at_offset(split(draw(n))[1]) for n in sizes]
        elif weight != grad:
            self.lists["master"] = [w.float() * 1.001 for w in ring[0]]

    def of(self, name: str) -> list[Tensor]:
        return self.lists.get(name, [])

    def copy(self) -> dict[str, list[Tensor]]:
        return {name: [t.clone() for t in tensors] for name, tensors in self.lists.items()}

    def step(
        self,
        lib: ctypes.CDLL,
        c: Coefficients,
        slots: tuple[int, int, int] = (0, 0, 0),
        *,
        stochastic: bool = False,
        carried: Sequence[int] = (),
        step: int = 1,
        **grid: int,
    ) -> None:
        """Step with the device pass."""
        columns = {
            on_host.EXP_AVG: "m",
            on_host.EXP_AVG_SQ: "v",
            on_host.EXP_AVG_SCALE: "m scale",
            on_host.EXP_AVG_SQ_SCALE: "v scale",
            on_host.RESIDUAL: "residual",
            on_host.MASTER: "master",
        }
        table = Table(lib, self.sizes, self.slots)
        for i in range(len(self.sizes)):
            held = {column: self.of(name)[i] for column, name in columns.items() if self.of(name)}
            ring = [self.of(f"slot {k}")[i] for k in range(self.slots)]
            table.hold(i, {on_host.GRAD: self.grads[i], **held}, ring, row=-1 if i in carried else 0)
        rows = torch.tensor([[*c, step]], dtype=torch.float64)
        # The seed is that of the codes also where weights are rounded to nearest.
        table.step(self.formats, rows, slots, normaliser=int(self.rule), seed=SEED, stochastic=stochastic, **grid)

    def expected(
        self,
        c: Coefficients,
        slots: tuple[int, int, int] = (0, 0, 0),
        *,
        stochastic: bool = False,
        carried: Sequence[int] = (),
        step: int = 1,
    ) -> dict[str, list[Tensor]]:
        """Return copies of the tensors after a step of the cpu backend."""
        n, left = len(self.sizes), self.copy()
        ring = [[torch.nn.Parameter(w) for w in left[f"slot {k}"]] for k in range(self.slots)]
        for i, p in enumerate(ring[slots[0]]):
            p.grad = None if i in carried else self.grads[i].clone()
        tensors = Tensors(
            names=[str(i) for i in range(n)],
            numbers=list(range(n)),
            groups=[0] * n,
            slots=ring,
            exp_avgs=left["m"],
            exp_avg_sqs=left.get("v", []),
            masters=left.get("master", [None] * n),
            steps=[torch.tensor(float(step - 1)) for _ in range(n)],
            mu_products=[],
            max_exp_avg_sqs=[],
            normaliser=self.rule,
            exp_avg_scales=left.get("m scale", []),
            exp_avg_sq_scales=left.get("v scale", []),
            residuals=left.get("residual", []),
            code_seed=SEED,
        )
        plan = make_plan("cpu", tensors, SEED if stochastic else None)
        plan.collect(StepSlots(*slots))
        plan.apply([c], [1.0])
        return {**left, **{f"slot {k}": [p.detach() for p in slot] for k, slot in enumerate(ring)}}


def assert_as_expected(problem: Problem, expected: dict[str, list[Tensor]]) -> None:
    for name, found in problem.lists.items():
        for i, (a, b) in enumerate(zip(found, expected[name], strict=True)):
            torch.testing.assert_close(
                a, b, rtol=0.0, atol=0.0, equal_nan=True, msg=lambda m, n=name, i=i: f"{n} of {i}: {m}"
            )


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("rule", Normaliser)
@pytest.mark.parametrize("formats", SMALL, ids=str)
def test_a_step_has_the_bits_of_the_cpu_backend(lib, formats, rule, offset):
    problem = Problem(formats, SIZES, rule=rule, offset=offset)
    expected = problem.expected(C, step=7)
    problem.step(lib, C, step=7)
    assert_as_expected(problem, expected)


@pytest.mark.parametrize("formats", [(BF16, BF16, CODE), (SPLIT, BF16, BF16)], ids=str)
def test_a_step_that_is_rounded_stochastically(lib, formats):
    problem = Problem(formats, SIZES)
    expected = problem.expected(C, stochastic=True)
    problem.step(lib, C, stochastic=True)
    assert_as_expected(problem, expected)


@pytest.mark.parametrize("formats", [(F32, F32, CODE), BOTH], ids=str)
def test_an_unusual_step(lib, formats):
    problem = Problem(formats, SIZES)
    expected = problem.expected(UNUSUAL)
    problem.step(lib, UNUSUAL)
    assert_as_expected(problem, expected)


@pytest.mark.parametrize("formats", [(F32, F32, CODE), (F32, BF16, CODE), BOTH], ids=str)
def test_a_ring(lib, formats):
    problem = Problem(formats, SIZES, slots=3)
    expected = problem.expected(C, (1, 2, 0), carried=(33, 64))
    problem.step(lib, C, (1, 2, 0), carried=(33, 64))
    assert_as_expected(problem, expected)


@pytest.mark.parametrize("rule", Normaliser)
@pytest.mark.parametrize("formats", [(F32, F32, CODE), (F16, F16, CODE), BOTH, (SPLIT, BF16, F32)], ids=str)
def test_what_is_not_finite_0_or_tiny(lib, formats, rule):
    problem = Problem(formats, [2048], rule=rule)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e-30, 1e-42, 3.39e38, 70000.0, 0.0])
    for t in (problem.grads[0], problem.of("slot 0")[0]):
        t[::67] = odd.repeat(4)[: len(t[::67])].to(t.dtype)
        t[1024:1400] = 0.0  # whole groups
    for name in ("m", "v", "m scale", "v scale"):
        for t in problem.of(name):
            t[len(t) // 2 : len(t) * 3 // 4] = 0
            if t.dtype == F16:
                t[3], t[4], t[5] = float("nan"), 2.0**-24, 65504.0
    for step in (1, 2):
        expected = problem.expected(C, step=step)
        problem.step(lib, C, step=step)
        assert_as_expected(problem, expected)


@pytest.mark.parametrize("threads", [1, 7, 256])
def test_the_grid_changes_nothing(lib, threads):
    problem = Problem(BOTH, [17, 16_385, 40_003])
    expected = problem.expected(C)
    problem.step(lib, C, threads=threads)
    assert_as_expected(problem, expected)
