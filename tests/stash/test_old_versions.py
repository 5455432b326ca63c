"""Rings whose older versions are kept in a short form: gradients, errors, memory, checkpoints, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backends import BACKENDS
from layers import LAYERS, data, layer, objective
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nesterov_pp as npp
from nesterov_pp import WeightStash
from nesterov_pp.kernels import differences
from nesterov_pp.optim import DelayCompensation, Discrepancy, GapAware, Prediction

SHORT = ("8bit-differences", "bfloat16")
VIEWED = [kind for kind in LAYERS if kind not in ("encoder", "lstm", "tied")]
"""Layers whose backward reads their weights from one place each, so that a test can overwrite them there."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, which is enough for tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def single(kind: str) -> nn.Module:
    return layer(kind).float()


def batch(seed: int) -> Tensor:
    return data(seed).float().requires_grad_()


class Ring:
    """A module with a ring, stepped like a pipeline's stage: ``tau`` microbatches are in flight."""

    def __init__(self, module: nn.Module, versions: int, form: str, *, lr: float = 0.02, **options: Any) -> None:
        shadow = getattr(options.get("prediction"), "shadow", None)
        exact = options.pop("exact_forward", False)
        self.module = module
        self.stash = WeightStash(module, versions, old_versions=form, shadow=shadow, exact_forward=exact)
        self.optimizer = npp.NAdam(module.parameters(), lr=lr, stash=self.stash, **options)

    def run(
        self, updates: int, *, first: int = 0, late: bool = False, linearise_at: str = "version", step: Any = None
    ) -> list[Tensor]:
        """Run updates; return the losses and the gradients of the inputs, then the weights.

        ``late``: run each forward only when its backward is due, at the old version, as an emulation does.
        """
        tau, stash = self.stash.versions - 1, self.stash
        in_flight: list[Any] = []
        found = []
        for m in range(first, first + updates + (0 if late else tau)):
            x, version = batch(m), max(0, m - tau) if late else stash.newest
            with stash.use(version, linearise_at=linearise_at):
                in_flight.append((version, objective(self.module(x)), x))
            if late or m >= tau:
                version, loss, x = in_flight.pop(0)
                loss.backward()
                (step or self.optimizer.step)(version=version)
                found += [loss.detach(), x.grad]
        return [*found, *(p.detach().clone() for p in self.module.parameters())]


def near_in_losses(one: list[Tensor], other: list[Tensor], updates: int, tolerance: float) -> None:
    """Compare losses and gradients of inputs, not weights, some of whose gradients are rounding errors alone."""
    torch.testing.assert_close(one[: 2 * updates], other[: 2 * updates], rtol=tolerance, atol=tolerance)


def same(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


RINGS = [("8bit-differences", 3, False), ("8bit-differences", 4, True), ("8bit-differences", 8, False)]
RINGS += [("bfloat16", 4, False), ("bfloat16", 5, True)]


@pytest.mark.parametrize(("form", "versions", "compiled"), RINGS)
@pytest.mark.parametrize("kind", VIEWED)
def test_backward_is_at_the_decoded_version_of_its_forward(kind, form, versions, compiled):
    """The reference is the same layer, overwritten behind autograd's back with what the test decodes itself."""
    torch._dynamo.reset()
    module = single(kind)
    ring = Ring(module, versions, form)
    call = torch.compile(module, backend="aot_eager") if compiled else module
    history, waiting = [], {}
    for v in range(versions):
        history.append([p.detach().clone() for p in module.parameters()])
        x = batch(v)
        with ring.stash.use(v):
            waiting[v] = (x, objective(call(x)))
        if v < versions - 1:
            for leaf in ring.stash.parameters(v).values():
                leaf.grad = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(v))
            ring.optimizer.step(version=v)
    for v, (x, loss) in waiting.items():
        loss.backward()
        y, twin = batch(v), single(kind)
        load(twin, history[v])
        expected = objective(twin(y))
        load(twin, decode(form, history, v))
        expected.backward()
        same([x.grad, *(leaf.grad for leaf in ring.stash.parameters(v).values())], [y.grad, *grads(twin)])


def load(module: nn.Module, weights: list[Tensor]) -> None:
    for p, w in zip(module.parameters(), weights, strict=True):
        p.data.copy_(w)


def grads(module: nn.Module) -> list[Any]:
    return [p.grad for p in module.parameters()]


def decode(form: str, history: list[list[Tensor]], version: int) -> list[Tensor]:
    if version == len(history) - 1:
        return history[-1]
    if form == "bfloat16":
        return [w.bfloat16().float() for w in history[version]]
    rows = len(history) - 1 - version
    codes, scales = differences.new_rows(history[0], rows)
    for row in range(rows):
        differences.encode(history[version + row], history[version + row + 1], codes, scales, row)
    out = [torch.zeros_like(w) for w in history[0]]
    differences.decode(history[-1], out, codes, scales, list(range(rows - 1, -1, -1)))
    return out


@pytest.mark.parametrize("versions", [3, 6])
@pytest.mark.parametrize("form", SHORT)
@pytest.mark.parametrize("kind", list(LAYERS))
def test_a_pipeline_and_its_emulation_agree_and_are_near_the_full_ring(kind, form, versions):
    """The emulation has all its memory to itself, so that the shared one is compared with something else."""
    pipeline = Ring(single(kind), versions, form, lr=1e-3).run(14)
    same(pipeline, Ring(single(kind), versions, form, lr=1e-3, exact_forward=True).run(14, late=True))
    full = Ring(single(kind), versions, "full", lr=1e-3).run(14)
    near_in_losses(pipeline, full, 14, 2e-3 if form == "8bit-differences" else 5e-2)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("form", SHORT)
def test_recomputation_runs_at_the_decoded_version(form, reentrant):
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.block = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 8))
            self.read: list[Tensor] = []

        def inside(self, x: Tensor) -> Tensor:
            self.read.append(self.block[0].weight.detach().clone())
            return self.block(x)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inside, x, use_reentrant=reentrant) + x

    ring = Ring(Again(), 4, form)
    pipeline = ring.run(12)
    same(pipeline, Ring(Again(), 4, form, exact_forward=True).run(12, late=True))
    ring, x, history = Ring(Again(), 4, form), batch(0), []
    with ring.stash.use(0):
        loss = objective(ring.module(x))
    version = ring.stash.newest
    for _ in range(3):
        history.append([p.detach().clone() for p in ring.module.parameters()])
        for leaf in ring.stash.parameters(ring.stash.newest).values():
            leaf.grad = torch.ones_like(leaf)
        ring.optimizer.step(version=ring.stash.newest)
    history.append([p.detach().clone() for p in ring.module.parameters()])
    loss.backward()
    assert version == ring.stash.newest - 3
    assert torch.equal(ring.module.read[-1], decode(form, history, 0)[0])


@pytest.mark.parametrize("form", SHORT)
def test_nothing_reads_the_buffer_before_it_is_filled(form):
    """The buffer is poisoned after every step."""
    clean, poisoned = Ring(single("encoder"), 5, form), Ring(single("encoder"), 5, form)

    def step(version: int) -> None:
        poisoned.optimizer.step(version=version)
        for t in poisoned.stash._old._buffer():
            t.fill_(torch.nan)

    same(poisoned.run(15, step=step), clean.run(15))


@pytest.mark.parametrize("versions", [3, 4, 8])
def test_errors_over_a_run(versions):
    ring = Ring(single("encoder"), versions, "8bit-differences", lr=1e-3)
    history: dict[int, list[Tensor]] = {0: [p.detach().clone() for p in ring.module.parameters()]}

    def step(version: int) -> None:
        ring.optimizer.step(version=version)
        history[ring.stash.newest] = [p.detach().clone() for p in ring.module.parameters()]

    ring.run(20, step=step)
    stash = ring.stash
    for v in range(stash.oldest, stash.newest):
        stash.show(v)
        apart = [p.detach() - w for p, w in zip(stash.parameters(v).values(), history[v], strict=True)]
        far = [a - b for a, b in zip(history[stash.newest], history[v], strict=True)]
        assert norm(apart) < 0.01 * norm(far)
    same([p.detach() for p in ring.module.parameters()], history[stash.newest])


def norm(tensors: list[Tensor]) -> float:
    return float(sum(t.double().square().sum() for t in tensors).sqrt())


@pytest.mark.parametrize(("form", "each"), [("8bit-differences", 1.0625), ("bfloat16", 2.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_what_is_counted(form, each, dtype):
    module = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)).to(dtype)
    count = sum(p.numel() for p in module.parameters())
    stash = WeightStash(module, 8, old_versions=form)
    leaves = {leaf.untyped_storage().data_ptr(): leaf.nbytes for slot in stash._slots for leaf in slot}
    rows = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in stash._old._rows.row(0).values()}
    own = sum(p.nbytes for p in module.parameters())
    assert stash.nbytes == sum(leaves.values()) - own + sum(rows.values())
    assert stash.nbytes == pytest.approx(7 * each * count, rel=0.01)
    assert WeightStash(copy.deepcopy(module), 8).nbytes == 7 * own
    assert WeightStash(copy.deepcopy(module), 2, old_versions=form).nbytes == pytest.approx(each * count, rel=0.01)
    assert WeightStash(copy.deepcopy(module), 1, old_versions=form).nbytes == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "option",
    [
        {"correction": DelayCompensation()},
        {"correction": DelayCompensation(strength=2.0, adaptive=True)},
        {"correction": GapAware()},
        {"prediction": Prediction()},
        {"prediction": Prediction(by="momentum")},
    ],
    ids=lambda option: type(next(iter(option.values()))).__name__,
)
def test_corrections_read_the_decoded_version(option, backend):
    """They read what the emulation decodes, and what a full ring would have is near."""
    short = Ring(single("encoder"), 5, "8bit-differences", lr=1e-3, backend=backend, **option).run(12)
    emulated = Ring(single("encoder"), 5, "8bit-differences", lr=1e-3, backend=backend, exact_forward=True, **option)
    same(short, emulated.run(12, late=True))
    full = Ring(single("encoder"), 5, "full", lr=1e-3, backend=backend, **option).run(12)
    near_in_losses(short, full, 12, 5e-3)


@pytest.mark.parametrize("rule", [npp.RotatedNAdam, npp.Lion, npp.NAG], ids=lambda rule: rule.__name__)
def test_every_rule_writes_the_ring(rule):
    def run(**options: Any) -> list[Tensor]:
        ring = Ring(single("encoder"), 5, lr=1e-3, **options)
        ring.stash._owner = None
        ring.optimizer = rule(ring.module.parameters(), lr=1e-3, stash=ring.stash)
        return ring.run(12, late="exact_forward" in options)

    short = run(form="8bit-differences")
    same(short, run(form="8bit-differences", exact_forward=True))
    near_in_losses(short, run(form="full"), 12, 5e-2)  # bases of a rotated rule turn with small changes


@pytest.mark.parametrize("form", SHORT)
@pytest.mark.parametrize("linearise_at", ["newest", "shadow"])
def test_backward_elsewhere_does_not_depend_on_the_form(form, linearise_at):
    def run(form: str) -> list[Tensor]:
        option = {"prediction": Discrepancy()} if linearise_at == "shadow" else {}
        return Ring(single("linear"), 5, form, **option).run(12, linearise_at=linearise_at)

    same(run(form), run("full"))


@pytest.mark.parametrize("form", SHORT)
def test_bfloat16_weights_with_masters(form):
    def run(form: str, **options: Any) -> list[Tensor]:
        module = single("encoder").bfloat16()
        ring = Ring(module, 5, form, lr=1e-3, master_weights=True, **options)
        found = []
        for update in range(12):
            version = max(0, update - 4)
            with ring.stash.use(version):
                loss = objective(module(data(update).bfloat16()).float())
                loss.backward()
            found.append(loss.detach())
            ring.optimizer.step(version=version)
        return [*found, *(p.detach().float() for p in module.parameters())]

    near = {"rtol": 0, "atol": 0} if form == "bfloat16" else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(run(form, exact_forward=True), run("full"), **near)


@pytest.mark.parametrize("there", ["full", *SHORT])
@pytest.mark.parametrize("here", ["full", *SHORT])
@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
def test_checkpoints_of_every_form(here, there, exact):
    """The same form goes on bit for bit; another one is converted. The newest version never changes."""
    first = Ring(single("encoder"), 5, there, lr=1e-3, exact_forward=exact)
    first.run(9, late=True)
    saved = copy.deepcopy((first.stash.state_dict(), first.optimizer.state_dict()))
    rest = first.run(8, first=9, late=True)
    second = Ring(single("encoder"), 5, here, lr=1e-3, exact_forward=exact)
    second.run(3, late=True)
    second.stash.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    same(list(second.stash.weights().values()), list(saved[0]["weights"][-1].values()))
    again = second.run(8, first=9, late=True)
    if here == there:
        same(again, rest)
    else:
        near_in_losses(again, rest, 8, 0.1)


def test_a_restart_with_the_exact_weights_goes_on_bit_for_bit():
    """Forwards that run again after a restart need the weights as they were, which the codes do not have."""
    first = Ring(single("encoder"), 4, "8bit-differences")
    first.run(9, late=True)
    kept, x = {}, batch(50)
    with first.stash.use(first.stash.newest):
        loss = objective(first.module(x))
        kept[first.stash.newest] = {n: p.detach().clone() for n, p in first.module.named_parameters()}
    for _ in range(2):
        for leaf in first.stash.parameters(first.stash.newest).values():
            leaf.grad = torch.ones_like(leaf)
        first.optimizer.step(version=first.stash.newest)
    saved = copy.deepcopy(first.stash.state_dict())
    loss.backward()
    second = Ring(single("encoder"), 4, "8bit-differences")
    second.stash.load_state_dict(saved)
    y, version = batch(50), next(iter(kept))
    with second.stash.use(version, weights=kept[version]):
        again = objective(second.module(y))
    again.backward()
    same(
        [loss, x.grad, *(p.grad for p in first.stash.parameters(version).values())],
        [again, y.grad, *(p.grad for p in second.stash.parameters(version).values())],
    )


def stepped(form: str, versions: int = 4, updates: int = 5) -> Ring:
    ring = Ring(single("linear"), versions, form)
    for v in range(updates):
        for leaf in ring.stash.parameters(v).values():
            leaf.grad = torch.ones_like(leaf)
        ring.optimizer.step(version=v)
    return ring


def test_states_that_do_not_fit_are_refused_and_nothing_is_changed():
    ring = stepped("8bit-differences")
    state = ring.stash.state_dict()
    before = copy.deepcopy(state)

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            ring.stash.load_state_dict({**state, **changes})

    refused("holds 3 versions at version 5; this one keeps 4 and needs 4", older=state["older"][:2])
    refused("'4bit', which is none of full", old_versions="4bit")
    refused("must be dicts of codes, scales", older=[{"codes": torch.zeros(1)}] * 3)
    refused("scales of older versions do not fit", older=[{**row, "scales": row["codes"]} for row in state["older"]])
    refused("2 of its 4 versions in full", weights=state["weights"] * 2)
    now = ring.stash.state_dict()
    for name in ("weights", "older"):
        torch.testing.assert_close(now[name], before[name], rtol=0, atol=0)


class Gain(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def test_parameters_that_a_form_cannot_keep_are_refused():
    with pytest.raises(
        ValueError, match="old_versions must be one of 'full', 'bfloat16', '8bit-differences', not '4bit'"
    ):
        WeightStash(nn.Linear(2, 2), 4, old_versions="4bit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keeps weights of float32, bfloat16, float16, but weight is float64"):
        WeightStash(nn.Linear(2, 2).double(), 4, old_versions="8bit-differences")
    with pytest.raises(ValueError, match="keeps weights of float32, bfloat16, but weight is float16"):
        WeightStash(nn.Linear(2, 2).half(), 4, old_versions="bfloat16")
    with pytest.raises(ValueError, match="but weight is complex64"):
        WeightStash(Gain(torch.zeros(2, dtype=torch.complex64)), 4, old_versions="8bit-differences")


def test_a_version_that_left_the_ring_is_an_error_not_a_wrong_gradient():
    ring = stepped("8bit-differences")
    x = batch(0)
    with ring.stash.use(5):
        loss = objective(ring.module(x))
    ring.stash.release(5)
    for v in range(5, 9):
        ring.stash.parameters(v)["weight"].grad = torch.ones(8, 8)
        ring.optimizer.step(version=v)
    with pytest.raises(RuntimeError, match="version 5, which has left the ring of versions 6 to 9"):
        loss.backward()


def test_a_forward_outside_of_any_block_is_refused_once_its_memory_is_used_for_something_else():
    ring = stepped("8bit-differences")
    loss = objective(ring.module(batch(0)))
    for v in (5, 6):
        for leaf in ring.stash.parameters(v).values():
            leaf.grad = torch.ones_like(leaf)
        ring.optimizer.step(version=v)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_several_versions_wait_side_by_side():
    ring, full = stepped("8bit-differences"), stepped("full")
    for one in (ring, full):
        for v in (3, 5):
            with one.stash.use(v):
                objective(one.module(batch(v))).backward()
    for v in (3, 5):
        for a, b in zip(ring.stash.parameters(v).values(), full.stash.parameters(v).values(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-2)
            assert a.grad.abs().max() > 0.1
    ring.optimizer.step(version=3)
    assert ring.stash.parameters(5)["weight"].grad is not None


def test_blocks_of_older_versions_nest():
    ring = stepped("8bit-differences")
    stash, module = ring.stash, ring.module
    values = {}
    for v in (3, 4, 5):
        with torch.no_grad(), stash.use(v):
            values[v] = module.weight.detach().clone()
    assert not torch.equal(values[3], values[4])
    with torch.no_grad(), stash.use(3):
        with stash.use(4):
            assert torch.equal(module.weight, values[4])
            with pytest.raises(ValueError, match="version 3 cannot be shown while the module computes with version 4"):
                stash.show(3)
        assert torch.equal(module.weight, values[3])
        with stash.use(5):
            assert torch.equal(module.weight, values[5])
        assert torch.equal(module.weight, values[3])
    assert torch.equal(module.weight, values[5])


def test_weights_pointed_elsewhere_are_taken_over():
    ring, other = stepped("8bit-differences"), stepped("8bit-differences")
    for one, write in ((ring, True), (other, False)):
        value = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
        if write:
            with torch.no_grad():
                one.module.weight.copy_(value)
        else:
            one.module.weight.data = value
    same(ring.run(9, first=5, late=True), other.run(9, first=5, late=True))


def test_frozen_parameters_stay_in_every_version():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ring = Ring(module, 4, "8bit-differences")
    ring.run(5, late=True)
    module[0].weight.requires_grad_(False)
    before = module[0].weight.detach().clone()
    ring.run(6, first=5, late=True)
    assert torch.equal(module[0].weight, before)
    for v in range(ring.stash.oldest, ring.stash.newest):
        ring.stash.show(v)
        assert torch.equal(ring.stash.parameters(v)["0.weight"], before)


def resumed_after(interrupt: Callable[[], None]) -> None:
    """Run ``interrupt``, which raises KeyboardInterrupt."""
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_a_step_that_is_interrupted_while_codes_are_written_is_finished_by_the_next_call(monkeypatch):
    ring, whole = stepped("8bit-differences"), stepped("8bit-differences")
    encode = differences.encode

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    for one in (ring, whole):
        for leaf in one.stash.parameters(5).values():
            leaf.grad = torch.ones_like(leaf)
    whole.optimizer.step(version=5)
    monkeypatch.setattr(differences, "encode", interrupted)
    resumed_after(lambda: ring.optimizer.step(version=5))
    monkeypatch.setattr(differences, "encode", encode)
    assert ring.stash.newest == 6
    same(ring.run(6, first=6, late=True), whole.run(6, first=6, late=True))
