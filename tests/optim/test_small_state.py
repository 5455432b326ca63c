"""Moments in eight bits and weights in 24, through the optimizers: steps, rings, checkpoints, groups, refusals."""

from __future__ import annotations

import copy

import backends
import pytest
import torch
from torch import nn
from torch.func import functional_call

import nesterov_pp as npp
from nesterov_pp.kernels import extension
from nesterov_pp.kernels.codes import Coded, decode_first, decode_second, joined
from nesterov_pp.optim.corrections import DelayCompensation

HOSTS = [name for name in backends.BACKENDS if name not in backends.ON_DEVICE]
RULES = [
    pytest.param(npp.NAdam, {"betas": (0.99, 0.999), "weight_decay": 0.1}, id="nadam"),
    pytest.param(npp.AdamW, {"betas": (0.9, 0.999)}, id="adamw"),
    pytest.param(npp.NAG, {"lr": 1e-2, "momentum": 0.9}, id="nag"),
    pytest.param(npp.Lion, {"lr": 1e-3}, id="lion"),
]
SHAPES = [(40, 33), (3,), (32,), (1,), (0,), (2, 3, 129)]
"""Whole groups, tails, less than a group and nothing."""
FORMATS = [
    pytest.param(torch.float32, {"state_dtype": "8bit"}, id="8bit"),
    pytest.param(torch.bfloat16, {"state_dtype": "8bit"}, id="8bit-bfloat16"),
    pytest.param(torch.bfloat16, {"state_dtype": "8bit", "stochastic_rounding": True}, id="8bit-stochastic"),
    pytest.param(torch.float16, {"state_dtype": "8bit"}, id="8bit-float16"),
    pytest.param(torch.bfloat16, {"state_dtype": "8bit", "master_weights": True}, id="8bit-masters"),
    pytest.param(torch.bfloat16, {"state_dtype": "8bit", "master_weights": "24bit"}, id="8bit-24bit"),
    pytest.param(torch.bfloat16, {"master_weights": "24bit"}, id="24bit"),
    pytest.param(torch.bfloat16, {"state_dtype": torch.bfloat16, "master_weights": "24bit"}, id="bfloat16-24bit"),
]


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    made.append(nn.Parameter(torch.randn(5, 7, 3, 3, generator=generator).to(dtype, memory_format=torch.channels_last)))
    return made


def set_gradients(made, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in made:
        size = torch.randn(p.shape, generator=generator).mul(2).exp()
        p.grad = (torch.randn(p.shape, generator=generator) * size).to(p.dtype)


def run(optimizer, made, steps, first=0):
    for step in range(first, first + steps):
        set_gradients(made, step)
        optimizer.step()


def tensors_of(optimizer):
    return {
        (key, name): value
        for key, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def assert_same_bits(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize(("rule", "options"), RULES)
def test_moments_are_kept_in_codes(rule, options, backend):
    made = parameters()
    optimizer = rule(made, state_dtype="8bit", backend=backend, **options)
    run(optimizer, made, 3)
    moments = [name for name in ("exp_avg", "exp_avg_sq") if name in optimizer.state[made[0]]]
    for p in made:
        state = optimizer.state[p]
        for name in moments:
            assert state[name].dtype == (torch.int8 if name == "exp_avg" else torch.uint8)
            assert state[name].shape == p.shape
            assert state[name].stride() == p.stride()
            assert state[f"{name}_scale"].shape == (-(-p.numel() // 32),)
    first = optimizer.state[made[0]]
    kept = sum(first[name].nbytes + first[f"{name}_scale"].nbytes for name in moments)
    assert kept / made[0].numel() < 1.07 * len(moments)


@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize(("rule", "options"), RULES)
def test_steps_follow_those_with_wide_moments(rule, options, backend):
    """The moments after a step are those of a float32 step from the same moments, rounded to codes."""
    made, wide = parameters(), parameters()
    optimizer = rule(made, state_dtype="8bit", backend=backend, **options)
    run(optimizer, made, 5)
    exact = rule(wide, backend=backend, **options)
    exact.load_state_dict(optimizer.widened_state_dict())
    with torch.no_grad():
        for p, q in zip(made, wide, strict=True):
            q.copy_(p)
    run(optimizer, made, 1, first=5)
    run(exact, wide, 1, first=5)
    assert_same_bits(made, wide)
    for p, q in zip(made, wide, strict=True):
        if p.numel() == 0:
            continue
        mine, m = optimizer.state[p], exact.state[q]["exp_avg"]
        close = decode_first(Coded(mine["exp_avg"], mine["exp_avg_scale"])) - m
        assert close.abs().max() <= m.abs().max() / 120
        if "exp_avg_sq" in mine:
            v = exact.state[q]["exp_avg_sq"]
            root = decode_second(Coded(mine["exp_avg_sq"], mine["exp_avg_sq_scale"])).sqrt()
            assert (root - v.sqrt()).abs().max() <= v.sqrt().max() / 250
            assert (root[v > 0] > 0).all()


@pytest.mark.skipif(len(HOSTS) < 2, reason="needs the compiled extension")
@pytest.mark.parametrize(("rule", "options"), RULES)
@pytest.mark.parametrize(("dtype", "formats"), FORMATS)
def test_backends_give_the_same_bits(rule, options, dtype, formats):
    module, _ = extension.load()
    selected, results = module.isa(), []
    try:
        for backend, isa in [*(("cpu", isa) for isa in module.isas()), ("reference", selected)]:
            module.set_isa(isa)
            made = parameters(dtype)
            optimizer = rule(made, seed=5, backend=backend, **formats, **options)
            run(optimizer, made, 6)
            results.append([*made, *tensors_of(optimizer).values()])
    finally:
        module.set_isa(selected)
    for found in results[:-1]:
        assert_same_bits(found, results[-1])


@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize(("dtype", "formats"), FORMATS)
def test_a_ring_takes_the_same_steps(dtype, formats, backend):
    model = nn.Linear(9, 40).to(dtype)
    plain = copy.deepcopy(model)
    stash = npp.WeightStash(model, versions=3)
    ring = npp.NAdam(model.parameters(), stash=stash, backend=backend, **formats)
    alone = npp.NAdam(plain.parameters(), backend=backend, **formats)
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    for _ in range(7):
        with stash.use(stash.newest):
            model(x).float().square().mean().backward()
        ring.step(version=stash.newest)
        alone.zero_grad()
        plain(x).float().square().mean().backward()
        alone.step()
    assert_same_bits(list(stash.parameters(stash.newest).values()), list(plain.parameters()))
    assert functional_call(model, stash.parameters(stash.newest), x).dtype == dtype


@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize(("rule", "options"), RULES)
@pytest.mark.parametrize(("dtype", "formats"), FORMATS)
def test_own_checkpoints_resume_bit_for_bit(rule, options, dtype, formats, backend):
    made = parameters(dtype)
    optimizer = rule(made, backend=backend, **formats, **options)
    run(optimizer, made, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = [nn.Parameter(p.detach().clone()) for p in made]
    second = rule(resumed, backend=backend, **formats, **options)
    second.load_state_dict(saved)
    assert_same_bits(tensors_of(optimizer).values(), tensors_of(second).values())
    run(optimizer, made, 3, first=3)
    run(second, resumed, 3, first=3)
    assert_same_bits([*made, *tensors_of(optimizer).values()], [*resumed, *tensors_of(second).values()])


@pytest.mark.parametrize(
    ("rule", "theirs"), [(npp.NAdam, torch.optim.NAdam), (npp.AdamW, torch.optim.AdamW)], ids=["nadam", "adamw"]
)
def test_checkpoints_of_torch_in_both_directions(rule, theirs):
    made, peers = parameters(), parameters()
    optimizer, peer = rule(made, state_dtype="8bit", lr=1e-3), theirs(peers, lr=1e-3)
    run(peer, peers, 3)
    optimizer.load_state_dict(peer.state_dict())
    for p, q in zip(made, peers, strict=True):
        mine, v = optimizer.state[p], peer.state[q]["exp_avg_sq"]
        if p.numel():
            root = decode_second(Coded(mine["exp_avg_sq"], mine["exp_avg_sq_scale"])).sqrt()
            assert (root - v.sqrt()).abs().max() <= v.sqrt().max() / 250
        assert mine["exp_avg"].dtype == torch.int8
    run(optimizer, made, 1, first=3)
    wide = optimizer.widened_state_dict()
    assert {t.dtype for state in wide["state"].values() for t in state.values()} == {torch.float32}
    peer.load_state_dict(wide)
    run(peer, peers, 1, first=3)
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 0 of group 0 is in eight bits.*widened_state_dict"):
        rule(parameters()).load_state_dict(optimizer.state_dict())


def test_groups_choose_their_own_format():
    made = parameters()
    groups = [{"params": made[:1], "state_dtype": torch.float32}, {"params": made[1:]}]
    optimizer = npp.AdamW(groups, state_dtype="8bit")
    run(optimizer, made, 2)
    assert optimizer.state[made[0]]["exp_avg"].dtype == torch.float32
    assert optimizer.state[made[1]]["exp_avg"].dtype == torch.int8
    peers = parameters()
    peer = torch.optim.AdamW([{"params": peers[:1]}, {"params": peers[1:]}])
    run(peer, peers, 1)
    optimizer.load_state_dict(peer.state_dict())
    run(optimizer, made, 1)
    assert optimizer.state[made[0]]["exp_avg"].dtype == torch.float32
    assert optimizer.state[made[1]]["exp_avg"].dtype == torch.int8


def test_state_laid_out_anew_keeps_its_values():
    made = [nn.Parameter(torch.randn(5, 7, 3, 3))]
    optimizer = npp.AdamW(made, state_dtype="8bit")
    run(optimizer, made, 2)
    before = optimizer.widened_state_dict()["state"][0]["exp_avg"].clone()
    made[0].data = made[0].data.to(memory_format=torch.channels_last)
    made[0].grad = torch.zeros_like(made[0])
    optimizer.param_groups[0]["betas"] = (1 - 1e-9, 1 - 1e-9)
    optimizer.step()
    after = optimizer.widened_state_dict()["state"][0]["exp_avg"]
    assert (after - before).abs().max() <= before.abs().max() / 60


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_what_is_not_finite_reaches_the_weights_of_its_group_alone(backend):
    p = nn.Parameter(torch.ones(96))
    optimizer = npp.NAdam([p], state_dtype="8bit", backend=backend)
    p.grad = torch.ones(96)
    p.grad[40] = torch.nan
    optimizer.step()
    assert p.isnan().nonzero().flatten().tolist() == [40]
    p.grad = torch.ones(96)
    optimizer.step()
    assert p.isnan().nonzero().flatten().tolist() == list(range(32, 64))


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_24_bits_keep_steps_that_16_lose(backend):
    start = torch.full((64,), 1.0).bfloat16()
    ends = {}
    for master in (False, True, "24bit"):
        p = nn.Parameter(start.clone())
        optimizer = npp.AdamW([p], lr=1e-4, weight_decay=0.0, master_weights=master, backend=backend)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        state = optimizer.state[p]
        ends[master] = joined(p.detach(), state["master_residual"]) if master == "24bit" else p.detach().float()
    assert torch.equal(ends[False], start.float())
    torch.testing.assert_close(ends["24bit"], torch.full((64,), 0.99), rtol=0.0, atol=100 * 2.0**-17)
    torch.testing.assert_close(ends[True], torch.full((64,), 0.99), rtol=0.0, atol=2.0**-9)


def test_masters_become_residuals_and_return():
    made, other = parameters(torch.bfloat16), parameters(torch.bfloat16)
    wide = npp.NAdam(made, master_weights=True)
    run(wide, made, 3)
    split = npp.NAdam(other, master_weights="24bit")
    with torch.no_grad():
        for p, q in zip(made, other, strict=True):
            q.copy_(p)
    split.load_state_dict(wide.state_dict())
    back = split.widened_state_dict()["state"]
    for k, p in enumerate(made):
        torch.testing.assert_close(back[k]["master_weight"], wide.state[p]["master_weight"], rtol=2.0**-15.9, atol=0.0)
    with pytest.raises(ValueError, match="saved with master_weights='24bit'"):
        wide.load_state_dict(split.state_dict())


REFUSED = [
    pytest.param(
        torch.float64, {"state_dtype": "8bit"}, "state_dtype=8bit cannot hold the moments of float64", id="double"
    ),
    pytest.param(
        torch.complex64, {"state_dtype": "8bit"}, "state_dtype=8bit cannot hold the moments of complex64", id="complex"
    ),
    pytest.param(torch.float16, {"master_weights": "24bit"}, "is for bfloat16, but a parameter is float16", id="half"),
    pytest.param(
        torch.float32, {"state_dtype": "4bit"}, "Invalid state_dtype: 4bit; choose one of", id="unknown-state"
    ),
    pytest.param(
        torch.float32,
        {"master_weights": "16bit"},
        "Invalid master_weights: '16bit'; choose one of",
        id="unknown-master",
    ),
    pytest.param(
        torch.float32, {"state_dtype": "8bit", "amsgrad": True}, "cannot be combined with amsgrad=True", id="amsgrad"
    ),
    pytest.param(
        torch.float32,
        {"state_dtype": "8bit", "differentiable": True},
        "cannot be combined with differentiable",
        id="differentiable",
    ),
]


@pytest.mark.parametrize(("dtype", "options", "message"), REFUSED)
def test_what_is_not_supported_is_refused_in_a_sentence(dtype, options, message):
    p = nn.Parameter(torch.ones(4).to(dtype))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=message):
        npp.AdamW([p], **options).step()
    assert torch.equal(p, torch.ones(4).to(dtype))


def test_corrections_are_refused():
    stash = npp.WeightStash(nn.Linear(2, 2), versions=2)
    for options in ({"state_dtype": "8bit"}, {"master_weights": "24bit"}):
        with pytest.raises(ValueError, match="cannot be combined with a correction or a prediction"):
            npp.NAdam(stash.parameters(0).values(), stash=stash, correction=DelayCompensation(), **options)


def test_saved_codes_of_other_groups_are_refused():
    made = parameters()
    optimizer = npp.AdamW(made, state_dtype="8bit")
    run(optimizer, made, 1)
    before = copy.deepcopy(optimizer.state_dict())
    for change in (lambda s: s.pop("exp_avg_scale"), lambda s: s.update(exp_avg_scale=torch.zeros(7).half())):
        saved = copy.deepcopy(before)
        change(saved["state"][0])
        with pytest.raises(
            ValueError, match="'exp_avg' of parameter 0 of group 0 is in eight bits and needs 42 float16"
        ):
            optimizer.load_state_dict(saved)
    assert_same_bits(tensors_of(optimizer).values(), [t for s in before["state"].values() for t in s.values()])
