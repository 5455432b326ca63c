"""Float32 master weights of low-precision parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from backends import BACKENDS
from tolerances import MANY_STEPS

import nesterov_pp as npp

LOW = [torch.bfloat16, torch.float16]
SHAPES = [(64, 33), (5,), (), (0,), (130, 130)]


def gradients(seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(w) for w in gradients(99, dtype)]


def run(optimizer, ps, seeds) -> None:
    for seed in seeds:
        for p, g in zip(ps, gradients(seed, ps[0].dtype), strict=True):
            p.grad = g
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", ["NAdam", "AdamW", "NAG"])
def test_the_master_is_a_float32_run_and_the_parameter_its_rounding(name, dtype, backend):
    low, full = parameters(dtype), [torch.nn.Parameter(p.detach().float()) for p in parameters(dtype)]
    ours = getattr(npp, name)(low, lr=1e-2, backend=backend, master_weights=True)
    theirs = getattr(npp, name)(full, lr=1e-2, backend=backend)
    for seed in range(20):
        for p, q, g in zip(low, full, gradients(seed, dtype), strict=True):
            p.grad, q.grad = g, g.float()
        ours.step()
        theirs.step()
    for p, q in zip(low, full, strict=True):
        master = ours.state[p]["master_weight"]
        assert master.dtype == ours.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(master, q)
        assert torch.equal(p, q.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_on_float32_agrees(backend):
    low, full = parameters(LOW[0]), [torch.nn.Parameter(p.detach().float()) for p in parameters(LOW[0])]
    ours = npp.NAdam(low, lr=1e-2, backend=backend, master_weights=True)
    theirs = torch.optim.NAdam(full, lr=1e-2)
    for seed in range(20):
        for p, q, g in zip(low, full, gradients(seed, LOW[0]), strict=True):
            p.grad, q.grad = g, g.float()
        ours.step()
        theirs.step()
    masters = [ours.state[p]["master_weight"] for p in low]
    torch.testing.assert_close(masters, [q.detach() for q in full], **MANY_STEPS[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("versions", [1, 3])
def test_ring_slots_take_the_copies(versions, backend):
    """Every version in the ring is the rounded master of that version."""
    torch.manual_seed(0)
    module = torch.nn.Linear(40, 41).to(torch.bfloat16)
    plain = copy.deepcopy(module)
    stash = npp.WeightStash(module, versions)
    ring = npp.NAdam(module.parameters(), lr=1e-2, stash=stash, master_weights=True, backend=backend)
    alone = npp.NAdam(plain.parameters(), lr=1e-2, master_weights=True, backend=backend)
    history = [[p.detach().clone() for p in plain.parameters()]]
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        leaves = stash.parameters(stash.newest).values()
        for leaf, p in zip(leaves, plain.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            leaf.grad = None if seed == 3 else p.grad.clone()
            p.grad = None if seed == 3 else p.grad
        ring.step(version=stash.newest)
        alone.step()
        history.append([p.detach().clone() for p in plain.parameters()])
        for version in range(stash.oldest, stash.newest + 1):
            for found, wanted in zip(stash.parameters(version).values(), history[version], strict=True):
                assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_first", [True, False])
def test_resuming_is_bit_exact_whichever_is_loaded_first(model_first, backend):
    ps = parameters(torch.bfloat16)
    optimizer = npp.NAdam(ps, master_weights=True, backend=backend)
    run(optimizer, ps, range(4))
    saved = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in ps]
    run(optimizer, ps, range(4, 8))
    resumed = parameters(torch.bfloat16)
    other = npp.NAdam(resumed, master_weights=True, backend=backend)
    run(other, resumed, [77])

    def load_model() -> None:
        with torch.no_grad():
            for p, value in zip(resumed, saved[1], strict=True):
                p.copy_(value)

    loads = [load_model, lambda: other.load_state_dict(saved[0])]
    for load in loads if model_first else reversed(loads):
        load()
    run(other, resumed, range(4, 8))
    for p, q in zip(ps, resumed, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["master_weight"], other.state[q]["master_weight"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_written_by_somebody_else_is_followed(backend):
    ps = parameters(torch.bfloat16)
    optimizer = npp.NAdam(ps, lr=0.0, master_weights=True, backend=backend)
    run(optimizer, ps, range(2))
    before = [optimizer.state[p]["master_weight"].clone() for p in ps]
    with torch.no_grad():
        ps[0][3] = 7.0
    run(optimizer, ps, [2])
    after = optimizer.state[ps[0]]["master_weight"]
    assert (after[3] == 7.0).all()
    rest = [i for i in range(len(after)) if i != 3]
    assert torch.equal(after[rest], before[0][rest])
    assert torch.equal(optimizer.state[ps[4]]["master_weight"], before[4])


def test_float32_parameters_have_no_master_and_mixed_lists_work():
    ps = [torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))]
    optimizer = npp.NAdam(ps, master_weights=True, state_dtype=torch.bfloat16)
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert "master_weight" not in optimizer.state[ps[0]]
    assert optimizer.state[ps[1]]["master_weight"].dtype == torch.float32
    assert torch.equal(ps[0].detach().to(torch.bfloat16), ps[1].detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_travels_to_and_from_optimizers_without_masters(backend):
    ps, qs = parameters(torch.bfloat16), parameters(torch.bfloat16)
    with_masters, without = npp.NAdam(ps, master_weights=True, backend=backend), npp.NAdam(qs, backend=backend)
    run(with_masters, ps, range(2))
    without.load_state_dict(with_masters.state_dict())
    assert all("master_weight" not in s for s in without.state.values())
    run(without, qs, [2])
    with_masters.load_state_dict(without.state_dict())
    run(with_masters, ps, [2])
    for p in ps:
        assert torch.equal(with_masters.state[p]["master_weight"].to(p.dtype), p.detach())
    torch_optimizer = torch.optim.NAdam(qs)
    torch_optimizer.load_state_dict(with_masters.state_dict())
    run(torch_optimizer, qs, [3])
