"""Random lists of parameters and random programs: what must hold whatever they are."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
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
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "transposed", "channels_last", "sliced"]
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


kinds = st.builds(Kind, shapes, st.sampled_from(LAYOUTS), st.sampled_from(DTYPES))
options = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-3, 1e-2]),
        "betas": st.sampled_from([(0.9, 0.999), (0.99, 0.95), (0.0, 0.5)]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "decoupled_weight_decay": st.booleans(),
        "maximize": st.booleans(),
    }
)
actions = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 2**10 - 1)),  # bit i: parameter i has a gradient
    st.tuples(st.sampled_from(["reload", "copy", "zero_grad"])),
    st.tuples(st.just("lr"), st.sampled_from([1e-4, 5e-3])),
    st.tuples(st.just("group"), kinds),
)


def laid_out(value: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed" and value.dim() >= 2:
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels_last" and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    if layout == "sliced" and value.dim() >= 1:
        return value.repeat_interleave(2, dim=-1)[..., ::2]
    return value.contiguous()


def parameter(kind: Kind, seed: int) -> torch.nn.Parameter:
    value = torch.randn(kind.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.Parameter(laid_out(value.to(kind.dtype), kind.layout))


def play(make: Any, members: list[Kind], groups: list[dict[str, Any]], program: list[tuple], *, resume=True) -> Any:
    """Run a program; without ``resume`` the steps that save, load and copy do nothing."""
    ps = [parameter(kind, i) for i, kind in enumerate(members)]
    split = [{"params": ps[k :: len(groups)], **group} for k, group in enumerate(groups)]
    optimizer = make([group for group in split if group["params"]])
    for t, (action, *argument) in enumerate(program):
        if action == "step":
            for i, p in enumerate(ps):
                generator = torch.Generator().manual_seed(100 * t + i)
                grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
                p.grad = laid_out(grad, LAYOUTS[(t + i) % 4]) if argument[0] >> (i % 10) & 1 else None
            optimizer.step()
        elif action == "reload" and resume:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            made = make([{"params": group["params"]} for group in optimizer.param_groups])
            made.load_state_dict(torch.load(file, weights_only=True))
            optimizer = made
        elif action == "copy" and resume:
            state = copy.deepcopy(optimizer).state_dict()
            optimizer.load_state_dict(state)
        elif action == "zero_grad":
            optimizer.zero_grad()
        elif action == "lr":
            for group in optimizer.param_groups:
                group["lr"] = argument[0]
        elif action == "group":
            ps.append(parameter(argument[0], len(ps)))
            optimizer.add_param_group({"params": [ps[-1]]})
    return ps, [optimizer.state.get(p, {}) for p in ps]


programs = st.lists(actions, min_size=2, max_size=8)
members = st.lists(kinds, min_size=1, max_size=6)
groupings = st.lists(options, min_size=1, max_size=3)
norms = st.sampled_from([None, 0.5])


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = MANY_STEPS.get(found.dtype) or {
        "rtol": 4 * torch.finfo(found.dtype).eps,
        "atol": 4e-2 * torch.finfo(found.dtype).eps,
    }
    torch.testing.assert_close(found.detach(), wanted.detach(), **tolerance)


@quickly
@given(members, groupings, programs, norms, st.sampled_from([None, torch.float32, torch.bfloat16]))
def test_the_cpu_backend_does_what_the_reference_does(members, groups, program, norm, state_dtype):
    if state_dtype is not None:
        members = [Kind(k.shape, k.layout, torch.float32 if k.dtype == torch.float64 else k.dtype) for k in members]
        program = [a for a in program if a[0] != "group"]
    extra = {"max_grad_norm": norm, "state_dtype": state_dtype}
    ours, our_state = play(lambda g: npp.NAdam(g, **extra), members, groups, program)
    theirs, their_state = play(lambda g: npp.NAdam(g, backend="reference", **extra), members, groups, program)
    for p, q, s, u in zip(ours, theirs, our_state, their_state, strict=True):
        close(p, q)
        assert s.keys() == u.keys()
        assert all(s[key].dtype == u[key].dtype for key in s)
        if s:
            assert float(s["step"]) == float(u["step"])


@quickly
@given(members, groupings, programs)
def test_float32_and_float64_do_what_torch_does(members, groups, program):
    full = {torch.bfloat16: torch.float32, torch.float16: torch.float64}
    members = [Kind(k.shape, k.layout, full.get(k.dtype, k.dtype)) for k in members]
    program = [("group", Kind(a[1].shape, a[1].layout, torch.float32)) if a[0] == "group" else a for a in program]
    ours, _ = play(npp.NAdam, members, groups, program)
    theirs, _ = play(torch.optim.NAdam, members, groups, program)
    for p, q in zip(ours, theirs, strict=True):
        # torch keeps the product of mu in float32, whatever the parameters.
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-5)


@quickly
@given(members, groupings, programs, norms, st.booleans())
def test_saving_loading_and_copying_leave_no_trace(members, groups, program, norm, stochastic):
    if stochastic:
        members = [Kind(k.shape, k.layout, torch.bfloat16) for k in members]
        program = [a for a in program if a[0] != "group"]

    def make(g):
        return npp.NAdam(g, max_grad_norm=norm, stochastic_rounding=stochastic, seed=3)

    resumed, _ = play(make, members, groups, program)
    straight, _ = play(make, members, groups, program, resume=False)
    for p, q in zip(resumed, straight, strict=True):
        assert torch.equal(p, q)


@settings(quickly, max_examples=25)
@given(members, groupings, st.integers(0, 2**10 - 1), st.sampled_from(DTYPES))
def test_instruction_sets_and_threads_leave_no_trace(members, groups, gradients, dtype):
    members = [*members, Kind((300_001,), "contiguous", dtype)]  # smaller lists are left to one thread
    selected, threads = C.isa(), torch.get_num_threads()
    results = []
    try:
        for isa in C.isas():
            for count in (1, 2):
                C.set_isa(isa)
                torch.set_num_threads(count)
                results.append(play(npp.NAdam, members, groups, [("step", gradients)] * 2)[0])
    finally:
        C.set_isa(selected)
        torch.set_num_threads(threads)
    for ps in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(ps, results[0], strict=True))


@quickly
@given(members, options, st.sampled_from([None, torch.float32]))
def test_one_step_is_at_most_one_rounding_from_the_reference(members, group, state_dtype):
    members = [Kind(k.shape, k.layout, torch.bfloat16 if k.dtype == torch.float64 else k.dtype) for k in members]
    program = [("step", 2**10 - 1)]
    ours, our_state = play(lambda g: npp.NAdam(g, state_dtype=state_dtype), members, [group], program)
    theirs, their_state = play(
        lambda g: npp.NAdam(g, state_dtype=state_dtype, backend="reference"), members, [group], program
    )
    for p, q, s, u in zip(ours, theirs, our_state, their_state, strict=True):
        for a, b in ((p, q), (s["exp_avg"], u["exp_avg"]), (s["exp_avg_sq"], u["exp_avg_sq"])):
            if a.dtype in ULPS:
                assert ulps_apart(a, b) <= ULPS[a.dtype]
            else:
                torch.testing.assert_close(a.detach(), b.detach(), **ONE_STEP[a.dtype])


@quickly
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=12),
    st.sampled_from(["NAdam", "AdamW", "NAG"]),
)
def test_the_ring_equals_full_copies_of_every_version(versions, program, name):
    """Each step takes the gradient at some older version, and now and then a parameter has none."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    plain = copy.deepcopy(module)
    stash = npp.WeightStash(module, versions)
    ring = getattr(npp, name)(module.parameters(), lr=1e-2, stash=stash)
    alone = getattr(npp, name)(plain.parameters(), lr=1e-2)
    history = [[p.detach().clone() for p in plain.parameters()]]
    for t, (age, bias_sits_out) in enumerate(program):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(t))
        version = max(stash.oldest, stash.newest - age)
        with stash.use(version):
            module(x).square().sum().backward()
        old = copy.deepcopy(plain)
        for p, value in zip(old.parameters(), history[version], strict=True):
            p.data = value.clone()
        old(x).square().sum().backward()
        for p, q in zip(plain.parameters(), old.parameters(), strict=True):
            p.grad = q.grad
        if bias_sits_out:
            stash.parameters(version)["0.bias"].grad = None
            plain[0].bias.grad = None
        ring.step(version=version)
        alone.step()
        history.append([p.detach().clone() for p in plain.parameters()])
        for v in range(stash.oldest, stash.newest + 1):
            for found, wanted in zip(stash.parameters(v).values(), history[v], strict=True):
                assert torch.equal(found, wanted)
