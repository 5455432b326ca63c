"""Properties that must hold for any list of parameters and any program, tested with random ones."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import MANY_STEPS, ONE_STEP, ULPS, ulps_apart

import nesterov_pp as npp
from nesterov_pp.kernels import extension

C, REASON = extension.load()
pytestmark = pytest.mark.skipif(C is None, reason=str(REASON))
quickly = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------- strategies

FULL = [torch.float32, torch.float64]
LOW = [torch.bfloat16, torch.float16]
DENSE = ["contiguous", "transposed", "channels_last"]
LAYOUTS = [*DENSE, "sliced"]
ALL = 2**10 - 1

shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 5000)),
    st.tuples(st.integers(0, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 7), st.integers(1, 7)),
)


@dataclass(frozen=True)
class Kind:
    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype


def kinds_of(layouts: list[str]) -> st.SearchStrategy[Kind]:
    return st.builds(Kind, shapes, st.sampled_from(layouts), st.sampled_from(FULL + LOW))


def programs_of(kinds: st.SearchStrategy[Kind]) -> st.SearchStrategy[list[tuple]]:
    step = st.tuples(st.just("step"), st.integers(0, ALL))  # bit i: parameter i has a gradient
    other = st.one_of(
        st.tuples(st.sampled_from(["step again", "reload", "copy"])),
        st.tuples(st.just("zero_grad"), st.booleans()),
        st.tuples(st.just("lr"), st.sampled_from([1e-4, 5e-3])),
        st.tuples(st.just("group"), kinds),
    )
    return st.lists(st.one_of(step, other), min_size=2, max_size=8)


dense = kinds_of(DENSE)
lists = st.lists(dense, min_size=1, max_size=6)
programs = programs_of(dense)
groupings = st.lists(
    st.fixed_dictionaries(
        {
            "lr": st.sampled_from([1e-3, 1e-2]),
            "betas": st.sampled_from([(0.9, 0.999), (0.99, 0.95), (0.0, 0.5)]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "decoupled_weight_decay": st.booleans(),
            "maximize": st.booleans(),
        }
    ),
    min_size=1,
    max_size=3,
)
norms = st.sampled_from([None, 0.5])
STORAGES: list[dict[str, Any]] = [
    {},
    {"state_dtype": torch.float32},
    {"state_dtype": torch.bfloat16},
    {"master_weights": True},
    {"stochastic_rounding": True, "seed": 3},
]
storages = st.sampled_from(STORAGES)


def fitting(storage: dict[str, Any], kind: Kind) -> Kind:
    """Return the kind with a dtype that fits the storage options."""
    if "state_dtype" in storage and kind.dtype == torch.float64:
        return replace(kind, dtype=torch.float32)
    if "stochastic_rounding" in storage and kind.dtype == torch.float16:
        return replace(kind, dtype=torch.bfloat16)
    return kind


def changed(change: Callable[[Kind], Kind], members: list[Kind], program: list[tuple]) -> tuple[list, list]:
    """Return members and program with ``change`` applied to every kind."""
    return [change(k) for k in members], [("group", change(a[1])) if a[0] == "group" else a for a in program]


# ---------------------------------------------------------------------- parameters and programs


def laid_out(value: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed" and value.dim() >= 2:
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels_last" and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    if layout == "sliced" and value.dim() >= 1:
        return value.repeat_interleave(2, dim=-1)[..., ::2]
    return value.contiguous()


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameter(kind: Kind, seed: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(laid_out(drawn(kind.shape, kind.dtype, seed), kind.layout))


def contents(ps: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the parameters, then their state."""
    return [p.detach() for p in ps] + [value for p in ps for _, value in sorted(optimizer.state.get(p, {}).items())]


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def play(
    make: Callable[[list], torch.optim.Optimizer],
    members: list[Kind],
    groups: list[dict[str, Any]],
    program: list[tuple],
    *,
    resume: bool = True,
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Run a program; without ``resume``, skip its saving, loading and copying."""
    ps = [parameter(kind, i) for i, kind in enumerate(members)]
    split = [{"params": ps[k :: len(groups)], **group} for k, group in enumerate(groups)]
    optimizer = make([group for group in split if group["params"]])
    left = []
    for t, (action, *argument) in enumerate(program):
        if action == "step":
            for i, p in enumerate(ps):
                grad = laid_out(drawn(p.shape, p.dtype, 100 * t + i), LAYOUTS[(t + i) % 4])
                p.grad = grad if argument[0] >> (i % 10) & 1 else None
            optimizer.step()
        elif action == "step again":
            optimizer.step()
        elif action == "reload" and resume:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = make([{"params": group["params"]} for group in optimizer.param_groups])
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        elif action == "copy" and resume:
            left.append((ps, optimizer, [value.clone() for value in contents(ps, optimizer)]))
            grads = [p.grad for p in ps]
            ps, optimizer = copy.deepcopy((ps, optimizer))
            for p, grad in zip(ps, grads, strict=True):
                p.grad = None if grad is None else grad.clone()
        elif action == "zero_grad":
            optimizer.zero_grad(set_to_none=argument[0])
        elif action == "lr":
            for group in optimizer.param_groups:
                group["lr"] = argument[0]
        elif action == "group":
            ps.append(parameter(argument[0], len(ps)))
            optimizer.add_param_group({"params": [ps[-1]]})
    for old, its, before in left:
        assert same_bits(contents(old, its), before), "the steps of a copy changed the original"
    return ps, optimizer


def close(found: torch.Tensor, wanted: torch.Tensor, *, clipped_with: list[torch.dtype] | None = None) -> None:
    """Compare results of a program.

    ``clipped_with``: the dtypes of the gradients whose norm scaled all of them; the norm is as exact as the least exact
    of them.
    """
    dtype = max([found.dtype, *(clipped_with or [])], key=lambda dtype: torch.finfo(dtype).eps)
    # Low precision: some of the eight steps may be rounded the other way, and later steps round the difference again.
    eps = torch.finfo(dtype).eps
    tolerance = MANY_STEPS.get(dtype) or {"rtol": 4 * eps, "atol": 4e-2 * eps}
    torch.testing.assert_close(found.detach(), wanted.detach(), **tolerance)


# ---------------------------------------------------------------------- properties


@quickly
@given(lists, groupings, programs, norms, storages)
def test_the_cpu_backend_does_what_the_reference_does(members, groups, program, norm, storage):
    members, program = changed(lambda kind: fitting(storage, kind), members, program)
    extra = {"max_grad_norm": norm, **storage}
    ours, optimizer = play(lambda g: npp.NAdam(g, backend="cpu", **extra), members, groups, program)
    theirs, reference = play(lambda g: npp.NAdam(g, backend="reference", **extra), members, groups, program)
    clipped_with = None if norm is None else [p.dtype for p in ours]
    for p, q in zip(ours, theirs, strict=True):
        if p.dtype != torch.bfloat16 or "stochastic_rounding" not in storage:
            close(p, q, clipped_with=clipped_with)
        s, u = optimizer.state.get(p, {}), reference.state.get(q, {})
        assert s.keys() == u.keys()
        assert all(s[key].dtype == u[key].dtype and s[key].stride() == u[key].stride() for key in s)
        for key in ("step", "mu_product"):
            assert not s or torch.equal(s[key], u[key])
        if p.dtype in FULL and s and s["exp_avg"].dtype in FULL:
            close(s["exp_avg"], u["exp_avg"], clipped_with=clipped_with)
            close(s["exp_avg_sq"], u["exp_avg_sq"], clipped_with=clipped_with)


@quickly
@given(st.lists(kinds_of(LAYOUTS), min_size=1, max_size=6), groupings, programs_of(kinds_of(LAYOUTS)))
def test_float32_and_float64_do_what_torch_does(members, groups, program):
    """This holds for whichever backend is chosen: tensors that are not dense use the reference."""
    full = {torch.bfloat16: torch.float32, torch.float16: torch.float64}
    members, program = changed(lambda kind: replace(kind, dtype=full.get(kind.dtype, kind.dtype)), members, program)
    # torch keeps the product of mu in the default dtype, whatever the parameters are.
    torch.set_default_dtype(torch.float64)
    try:
        ours, _ = play(npp.NAdam, members, groups, program)
        theirs, _ = play(torch.optim.NAdam, members, groups, program)
    finally:
        torch.set_default_dtype(torch.float32)
    for p, q in zip(ours, theirs, strict=True):
        close(p, q)


@quickly
@given(lists, groupings, programs, st.tuples(st.integers(1, 7), st.sampled_from(["reload", "copy"])), norms, storages)
def test_saving_loading_and_copying_leave_no_trace(members, groups, program, interruption, norm, storage):
    members, program = changed(lambda kind: fitting(storage, kind), members, program)
    at, action = interruption
    program = [*program[:at], (action,), *program[at:]]

    def make(g: list) -> npp.NAdam:
        return npp.NAdam(g, max_grad_norm=norm, backend="cpu", **storage)

    resumed = contents(*play(make, members, groups, program))
    straight = contents(*play(make, members, groups, program, resume=False))
    assert same_bits(resumed, straight)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@settings(quickly, max_examples=8)
@given(
    lists,
    st.tuples(st.integers(140_000, 300_000), st.integers(0, 6), st.sampled_from(FULL + LOW)),
    groupings,
    st.integers(0, ALL),
    norms,
)
def test_instruction_sets_and_threads_leave_no_trace(storage, members, large, groups, gradients, norm):
    """One parameter is so large that a step splits it between threads."""
    size, place, dtype = large
    members = [*members[:place], Kind((size,), "contiguous", dtype), *members[place:]]
    members, _ = changed(lambda kind: fitting(storage, kind), members, [])
    selected, threads = C.isa(), torch.get_num_threads()
    results = []
    try:
        for isa in C.isas():
            for count in (1, 2):
                C.set_isa(isa)
                torch.set_num_threads(count)
                program = [("step", ALL), ("step", gradients)]
                results.append(
                    contents(*play(lambda g: npp.NAdam(g, max_grad_norm=norm, **storage), members, groups, program))
                )
    finally:
        C.set_isa(selected)
        torch.set_num_threads(threads)
    assert all(same_bits(result, results[0]) for result in results[1:])


@quickly
@given(lists, groupings, st.sampled_from([{}, {"state_dtype": torch.float32}, {"state_dtype": torch.bfloat16}]))
def test_one_step_is_at_most_one_rounding_from_the_reference(members, groups, storage):
    members, _ = changed(lambda kind: fitting(storage, kind), members, [])
    results = []
    for backend in ("cpu", "reference"):
        make = lambda g, backend=backend: npp.NAdam(g, backend=backend, **storage)  # noqa: E731
        results.append(contents(*play(make, members, groups, [("step", ALL)])))
    for a, b in zip(*results, strict=True):
        if a.dtype in ULPS:
            assert ulps_apart(a, b) <= ULPS[a.dtype]
        else:
            torch.testing.assert_close(a, b, **ONE_STEP[a.dtype])


# ---------------------------------------------------------------------- the ring


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))


class Copies:
    """A model of a ring that keeps a full copy of every version ever made, and the gradients of each."""

    def __init__(self, name: str, versions: int) -> None:
        self.module, self.versions = network(), versions
        self.optimizer = getattr(npp, name)(self.module.parameters(), lr=1e-2, backend="cpu")
        self.history = [self.copy()]
        self.gradients: list[dict[str, torch.Tensor]] = [{}]
        self.in_flight, self.ready = [0], [0]  # microbatches of each version: not yet stepped; those with backward done

    def copy(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    @property
    def newest(self) -> int:
        return len(self.history) - 1

    @property
    def oldest(self) -> int:
        return max(0, len(self.history) - self.versions)

    def backward(self, version: int, x: torch.Tensor) -> None:
        weights = {name: value.clone().requires_grad_() for name, value in self.history[version].items()}
        torch.func.functional_call(self.module, weights, x).square().sum().backward()
        for name, weight in weights.items():
            old = self.gradients[version].get(name)
            self.gradients[version][name] = weight.grad if old is None else old + weight.grad
        self.ready[version] += 1

    def blocked(self, version: int) -> bool:
        """Return whether the step would overwrite a version that other microbatches still need."""
        leaving = len(self.history) - self.versions
        if leaving < 0:
            return False
        return self.in_flight[leaving] - (max(1, self.ready[version]) if leaving == version else 0) > 0

    def step(self, version: int) -> None:
        for name, p in self.module.named_parameters():
            total = self.gradients[version].get(name)
            p.grad = None if total is None else total * (1.0 / max(1, self.ready[version]))
        self.optimizer.step()
        self.in_flight[version] -= self.ready[version]
        self.ready[version] = 0
        self.gradients[version] = {}
        self.history.append(self.copy())
        for per_version, start in ((self.gradients, {}), (self.in_flight, 0), (self.ready, 0)):
            per_version.append(start)


ring_actions = st.tuples(
    st.sampled_from(["forward", "forward", "backward", "backward", "step", "step", "sit out", "release", "reload"]),
    st.integers(0, 4),
)


@quickly
@given(st.integers(1, 5), st.lists(ring_actions, min_size=8, max_size=30), st.sampled_from(["NAdam", "AdamW", "NAG"]))
def test_the_ring_equals_full_copies_of_every_version(versions, program, name):
    """Microbatches of several versions are in flight at once, and their backwards come in any order."""
    model = Copies(name, versions)
    module = network()
    stash = npp.WeightStash(module, versions)
    optimizer = getattr(npp, name)(module.parameters(), lr=1e-2, stash=stash, backend="cpu")
    pending: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    for t, (action, k) in enumerate(program):
        version = max(model.oldest, model.newest - k)
        if action == "forward":
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(t))
            with stash.use(version):
                pending.append((version, x, module(x).square().sum()))
            model.in_flight[version] += 1
        elif action == "backward" and pending:
            of, x, loss = pending.pop(k % len(pending))
            loss.backward()
            model.backward(of, x)
        elif action == "release" and pending:
            of, _, _ = pending.pop(k % len(pending))
            stash.release(of)
            model.in_flight[of] -= 1
        elif action == "sit out":
            stash.parameters(version)["0.bias"].grad = None
            model.gradients[version].pop("0.bias", None)
        elif action == "reload" and not any(model.in_flight):
            saved = copy.deepcopy((stash.state_dict(), optimizer.state_dict()))
            module = network()
            stash = npp.WeightStash(module, versions)
            optimizer = getattr(npp, name)(module.parameters(), stash=stash, backend="cpu")
            stash.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        elif action == "step" and (model.ready[version] or not model.in_flight[version]):
            step = {"version": version, "microbatches": max(1, model.ready[version])}
            if model.blocked(version):
                with pytest.raises(ValueError, match="would overwrite"):
                    optimizer.step(**step)
            else:
                optimizer.step(**step)
                model.step(version)
        assert (stash.oldest, stash.newest) == (model.oldest, model.newest)
        for v in range(model.oldest, model.newest + 1):
            assert stash.in_flight(v) == model.in_flight[v]
            for key, leaf in stash.parameters(v).items():
                assert torch.equal(leaf, model.history[v][key])
                wanted = model.gradients[v].get(key)
                assert (leaf.grad is None) == (wanted is None)
                assert wanted is None or torch.equal(leaf.grad, wanted)
