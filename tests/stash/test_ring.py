"""The ring: no copies, refusal of misuse, checkpoints, memory."""

from __future__ import annotations

import copy

import pytest
import torch
from backends import BACKENDS
from layers import data, layer, objective
from torch import nn

import nesterov_pp as npp
from nesterov_pp import WeightStash


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_copies_no_weights(backend):
    """Slots keep their memory; a step reads the newest slot and writes the next.

    With every other slot poisoned, no result is NaN, and each slot is written exactly once per round.
    """
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    versions = 3
    stash = WeightStash(module, versions)
    optimizer = npp.NAdam(module.parameters(), stash=stash, backend=backend)
    slots = [stash._slots[s] for s in range(versions)]
    addresses = [[leaf.data_ptr() for leaf in slot] for slot in slots]
    assert len({a for slot in addresses for a in slot}) == versions * len(stash.names)
    for update in range(7):
        source, target = update % versions, (update + 1) % versions
        for s, slot in enumerate(slots):
            if s != source:
                for leaf in slot:
                    leaf.data.fill_(torch.nan)
        kept = [[leaf.detach().clone() for leaf in slot] for slot in slots]
        for leaf in slots[source]:
            leaf.grad = torch.ones_like(leaf)
        optimizer.step(version=update)
        for s, slot in enumerate(slots):
            assert [leaf.data_ptr() for leaf in slot] == addresses[s]
            for leaf, old in zip(slot, kept[s], strict=True):
                if s == target:
                    assert torch.isfinite(leaf).all()
                else:
                    assert torch.equal(leaf.isnan(), old.isnan())
                    assert torch.equal(leaf.nan_to_num(), old.nan_to_num())
        assert [p.data_ptr() for p in module.parameters()] == addresses[target]


def test_a_step_allocates_nothing():
    module = nn.Linear(256, 256)
    stash = WeightStash(module, 4)
    optimizer = npp.NAdam(module.parameters(), stash=stash)

    def step() -> None:
        for leaf in stash.parameters(stash.newest).values():
            leaf.grad = gradient[leaf.shape]
        optimizer.step(version=stash.newest)

    gradient = {leaf.shape: torch.ones_like(leaf) for leaf in module.parameters()}
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated < 256 * 256 * 4 / 100, "a copy of the weights would be 256 KiB"


@pytest.mark.parametrize("backend", BACKENDS)
def test_ring_and_no_ring_give_the_same_bits(backend):
    plain, ringed = layer("encoder"), layer("encoder")
    stash = WeightStash(ringed, 5)
    one = npp.NAdam(plain.parameters(), lr=1e-2, backend=backend)
    other = npp.NAdam(ringed.parameters(), lr=1e-2, stash=stash, backend=backend)
    for t in range(12):
        one.zero_grad()
        objective(plain(data(t))).backward()
        one.step()
        with stash.use(stash.newest):
            objective(ringed(data(t))).backward()
        other.step()
        for p, q in zip(plain.parameters(), ringed.parameters(), strict=True):
            assert torch.equal(p, q)


def test_frozen_parameters_buffers_and_missing_gradients():
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    module[0].weight.requires_grad_(False)
    frozen = module[0].weight
    stash = WeightStash(module, 3)
    optimizer = npp.NAdam([p for p in module.parameters() if p.requires_grad], lr=0.1, stash=stash)
    assert "0.weight" not in stash.names
    for update in range(5):
        before = {n: p.detach().clone() for n, p in module.named_parameters()}
        leaves = stash.parameters(update)
        for name, leaf in leaves.items():
            leaf.grad = None if name == "2.bias" and update % 2 else torch.ones_like(leaf)
        optimizer.step(version=update)
        assert module[0].weight is frozen
        for name, p in module.named_parameters():
            stays = name == "0.weight" or (name == "2.bias" and update % 2)
            assert torch.equal(p, before[name]) == bool(stays), name
    module(torch.randn(4, 8))
    assert module[1].num_batches_tracked == 1


def test_evaluation_is_not_in_flight_and_blocks_nest():
    module = layer("linear")
    stash = WeightStash(module, 2)
    with torch.no_grad(), stash.use(0):
        module(data(0))
    assert stash.in_flight(0) == 0
    optimizer = npp.NAdam(module.parameters(), stash=stash)
    for leaf in stash.parameters(0).values():
        leaf.grad = torch.ones_like(leaf)
    optimizer.step(version=0)
    old, new = stash.parameters(0)["weight"], stash.parameters(1)["weight"]
    with torch.no_grad():
        with stash.use(0):
            assert module.weight is old
            with stash.use(1):
                assert module.weight is new
            assert module.weight is old
        assert module.weight is new
    with pytest.raises(ZeroDivisionError), stash.use(1):
        raise ZeroDivisionError
    assert stash.in_flight(1) == 0, "a forward that failed is not in flight"


def stepped(versions: int, updates: int) -> tuple[nn.Module, WeightStash, npp.NAdam]:
    module = layer("linear")
    stash = WeightStash(module, versions)
    optimizer = npp.NAdam(module.parameters(), stash=stash)
    for v in range(updates):
        for leaf in stash.parameters(v).values():
            leaf.grad = torch.ones_like(leaf)
        optimizer.step(version=v)
    return module, stash, optimizer


def test_misuse_gives_one_clear_sentence_and_changes_nothing():
    module, stash, optimizer = stepped(versions=3, updates=5)

    def wait_on_the_oldest() -> None:
        with stash.use(3):
            objective(module(data(0)))
        optimizer.step(version=5)

    def overwrite() -> None:
        with stash.use(3):
            module(data(0))
            with stash.use(4):
                module(data(0))
        stash.parameters(5)["weight"].grad = torch.ones_like(module.weight)
        optimizer.step(version=5)

    def unnamed() -> None:
        stash.parameters(4)["weight"].grad = torch.ones_like(module.weight)
        optimizer.step()

    cases = [
        (lambda: stash.use(2).__enter__(), "version 2 has left the ring, which holds versions 3 to 5"),
        (lambda: stash.use(6).__enter__(), "version 6 does not exist; the newest is 5"),
        (lambda: stash.use(-1).__enter__(), "version -1 does not exist"),
        (lambda: optimizer.step(version=2), "version 2 has left the ring"),
        (wait_on_the_oldest, "would overwrite version 3, which 1 microbatch(es) in flight still need"),
        (overwrite, "would overwrite version 3, which 2 microbatch(es) in flight still need"),
        (unnamed, "say which to take: step(version=4)"),
        (lambda: npp.NAdam(module.parameters(), stash=stash), "already has an optimizer"),
        (lambda: npp.NAdam([module.weight], stash=stash), "bias is missing"),
        (lambda: npp.NAdam([nn.Parameter(torch.ones(2))], stash=stash), "is not in the WeightStash"),
        (lambda: WeightStash(module, 0), "versions must be at least 1"),
    ]
    for misuse, sentence in cases:
        before = [{n: t.clone() for n, t in w.items()} for w in stash.state_dict()["weights"]]
        with pytest.raises(ValueError) as error:
            misuse()
        assert sentence in str(error.value)
        assert "\n" not in str(error.value)
        assert stash.newest == 5
        for saved, now in zip(before, stash.state_dict()["weights"], strict=True):
            assert all(torch.equal(saved[n], now[n]) for n in saved)
        assert float(optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]) == 5
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(optimizer)


def test_parameters_that_cannot_be_kept_in_a_ring():
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = nn.Parameter(shared[0].weight.data)
    with pytest.raises(ValueError, match=r"1\.weight shares memory with 0\.weight; tie them"):
        WeightStash(shared, 2)
    hooked = nn.Linear(4, 4)
    hooked.weight.register_hook(lambda g: g)
    with pytest.raises(ValueError, match="weight carries hooks"):
        WeightStash(hooked, 2)
    expanded = nn.Linear(4, 4)
    expanded.weight = nn.Parameter(torch.ones(1, 4).expand(4, 4))
    with pytest.raises(ValueError, match="weight is not a dense strided tensor"):
        WeightStash(expanded, 2)


def test_a_checkpoint_restores_every_live_version(tmp_path):
    module, stash, optimizer = stepped(versions=3, updates=4)
    torch.save({"stash": stash.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "stage.pt")
    saved = torch.load(tmp_path / "stage.pt", weights_only=True)
    again = layer("linear", seed=9)
    restored = WeightStash(again, 3)
    resumed = npp.NAdam(again.parameters(), stash=restored)
    restored.load_state_dict(saved["stash"])
    resumed.load_state_dict(saved["optimizer"])
    for v in (2, 3, 4):
        for name, leaf in stash.parameters(v).items():
            assert torch.equal(leaf, restored.parameters(v)[name])
    for v in (4, 5, 6):
        for s, o in ((stash, optimizer), (restored, resumed)):
            for leaf in s.parameters(v).values():
                leaf.grad = torch.full_like(leaf, 0.5)
            o.step(version=v)
    assert torch.equal(module.weight, again.weight)

    for other, sentence in (
        (WeightStash(layer("linear"), 2), "holds 3 versions at version 4"),
        (WeightStash(layer("layernorm"), 3), "weight was saved as"),
        (WeightStash(layer("linear without bias"), 3), "of another module: bias differ"),
    ):
        before = {n: p.detach().clone() for n, p in other.parameters(0).items()}
        with pytest.raises(ValueError, match=sentence):
            other.load_state_dict(saved["stash"])
        assert other.newest == 0
        assert all(torch.equal(before[n], p) for n, p in other.parameters(0).items())


def test_memory_is_versions_times_the_weights():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    one = sum(p.untyped_storage().nbytes() for p in module.parameters())
    stash = WeightStash(module, 5)
    total = sum(leaf.untyped_storage().nbytes() for v in range(5) for leaf in stash._slots[v])
    assert total == 5 * one


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("unscale", [False, True], ids=["by the step", "by hand"])
def test_a_grad_scaler_is_refused_before_anything_is_written(unscale, fused):
    """A scaler would unscale the gradients of version 0, already stepped here, and leave those of version 1 scaled."""
    module = torch.nn.Linear(4, 3)
    stash = npp.WeightStash(module, 2)
    optimizer = npp.NAdam(module.parameters(), stash=stash, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    for version in (0, 1):
        with stash.use(version):
            loss = module(torch.ones(2, 4)).sum()
        (scaler.scale(loss) if version else loss).backward()
        if version == 0:
            optimizer.step(version=0)
    before = [p.detach().clone() for p in module.parameters()]
    gradients = [p.grad.clone() for p in module.parameters()]
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(ValueError, match="GradScaler sees the gradients of one weight version only; use bfloat16"):
        scaler.step(optimizer, version=1)
    assert stash.newest == 1
    for p, q, g in zip(stash.parameters(1).values(), before, gradients, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.grad, g)
    optimizer.step(version=1)
    assert stash.newest == 2
