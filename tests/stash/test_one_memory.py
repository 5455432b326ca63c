"""Rings that keep one version in full: steps over gradients, weights decoded one at a time, failures."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from backends import BACKENDS
from interrupted import Interrupted
from layers import data, objective
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nesterov_pp as npp
from nesterov_pp import WeightStash

FORM = "8bit-differences"
FORMATS: list[dict[str, Any]] = [
    {},
    {"state_dtype": "8bit"},
    {"master_weights": True},
    {"master_weights": "24bit", "state_dtype": "8bit"},
    {"stochastic_rounding": True},
]


def stage(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.LayerNorm(40), nn.Linear(40, 8)).to(dtype)


def ring(form: str = FORM, versions: int = 4, module: nn.Module | None = None, **options: Any) -> Any:
    module = stage() if module is None else module
    stash = WeightStash(module, versions, old_versions=form)
    return module, stash, npp.NAdam(module.parameters(), lr=0.02, stash=stash, **options)


def give(stash: WeightStash, version: int, seed: int) -> list[Tensor]:
    """Give gradients to the leaves of a version, each with memory of its own; return copies."""
    generator = torch.Generator().manual_seed(seed)
    for leaf in stash.parameters(version).values():
        leaf.grad = torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
    return [leaf.grad.clone() for leaf in stash.parameters(version).values()]


def weights(stash: WeightStash) -> list[Tensor]:
    return [p.detach().clone() for p in stash.weights().values()]


def same(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", FORMATS, ids=lambda o: "-".join(map(str, o.values())) or "plain")
@pytest.mark.parametrize("late", [0, 3])
def test_a_step_over_gradients_has_the_bits_of_one_beside_them(backend, dtype, options, late):
    """Also where a gradient goes to the very version whose place in the ring the step takes."""

    def run(form: str) -> list[Tensor]:
        _, stash, optimizer = ring(form, module=stage(dtype), backend=backend, **options)
        for t in range(7):
            version = max(0, t - late)
            give(stash, version, t)
            optimizer.step(version=version)
        return [*weights(stash), *(v for s in optimizer.state.values() for v in s.values() if v.dim() > 0)]

    same(run(FORM), run("full"))


def test_a_step_takes_no_memory_and_the_gradients_are_gone():
    _, stash, optimizer = ring()
    give(stash, 0, 0)
    optimizer.step()
    lent = []
    for t in range(1, 4):
        give(stash, t, t)
        grads = [p.grad for p in stash.parameters(t).values()]
        own = [p.data_ptr() for p in stash.parameters(t).values()]
        optimizer.step(version=t)
        assert own == [p.data_ptr() for p in stash.parameters(t + 1).values()], "weights stay where they are"
        same(grads, weights(stash))  # the step has written over them
        assert all(p.grad is None for p in stash.parameters(t).values())
        lent += grads
    assert stash.nbytes == pytest.approx(3 * 1.0625 * sum(p.numel() for p in stash.parameters(3).values()), rel=0.2)
    assert stash._old._spare == []


def held(p: Tensor) -> Any:
    return p.grad.view(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["held", "together", "transposed", "expanded", "shared", "with a history", "none"])
def test_gradients_that_are_no_memory_of_their_own_are_not_written(backend, kind):
    """Autograd itself gives leaves views of one tensor, for example of a sum of two."""
    kept: list[Tensor] = []

    def run(form: str, odd: bool) -> list[Tensor]:
        _, stash, optimizer = ring(form, backend=backend)
        for t in range(3):
            give(stash, t, 0)
            leaves = list(stash.parameters(t).values())
            if kind in ("expanded", "shared"):
                for leaf in leaves:
                    leaf.grad = torch.ones_like(leaf)
            if kind == "none":
                leaves[1].grad = None
            if odd and kind == "held":
                kept.extend(held(leaf) for leaf in leaves)
            elif odd and kind == "together":
                flat = torch.cat([leaf.grad.flatten() for leaf in leaves])
                for leaf, g in zip(leaves, flat.split([leaf.numel() for leaf in leaves]), strict=True):
                    leaf.grad = g.view_as(leaf)
                kept.append(flat)
            elif odd and kind == "transposed":
                for leaf in leaves:
                    leaf.grad = leaf.grad.t().contiguous().t() if leaf.dim() == 2 else leaf.grad
            elif odd and kind == "expanded":
                for leaf in leaves:
                    leaf.grad = torch.ones(()).expand(leaf.shape)
            elif odd and kind == "shared":
                one = torch.ones(leaves[0].numel())
                for leaf in leaves:
                    if leaf.numel() == one.numel():
                        leaf.grad = one.view(leaf.shape)
            elif odd and kind == "with a history":
                for leaf in leaves:
                    leaf.grad = leaf.grad.requires_grad_() * 1.0
            before = [t.clone() for t in kept]
            optimizer.step(version=t)
            same(kept, before)
        return weights(stash)

    same(run(FORM, True), run("full", False))


def test_a_step_that_is_refused_keeps_weights_and_gradients():
    _, stash, optimizer = ring(on_nonfinite="raise")
    give(stash, 0, 0)
    leaf = stash.parameters(0)["0.weight"]
    leaf.grad[0, 0] = torch.nan
    before, grads = weights(stash), [p.grad for p in stash.parameters(0).values()]
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert all(p.grad is g for p, g in zip(stash.parameters(0).values(), grads, strict=True))
    same(weights(stash), before)
    own = [p.data_ptr() for p in stash.parameters(0).values()]
    assert all([leaf.data_ptr() for leaf in slot] == own for slot in stash._slots), "no gradient's memory is kept"
    leaf.grad[0, 0] = 1.0
    optimizer.step()
    assert stash.newest == 1


def test_a_step_that_fails_half_way_takes_its_gradients_with_it(monkeypatch):
    """Some of them may hold weights already, and must not be taken for gradients again."""
    import nesterov_pp.kernels.reference as reference

    _, stash, optimizer = ring(backend="reference")
    give(stash, 0, 0)
    before, update, calls = weights(stash), reference.update, []

    def failing(*tensors: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory left")
        update(*tensors, **options)

    monkeypatch.setattr(reference, "update", failing)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert stash.newest == 0
    same(weights(stash), before)
    assert all(p.grad is None for p in stash.parameters(0).values())


def passed(stash: WeightStash, optimizer: Any, version: int) -> None:
    """Step up to the end of the pass, without ``end_step``."""
    finished, dropped = stash.end_step, stash.drop_step
    stash.end_step = stash.drop_step = lambda *_, **__: None
    optimizer.step(version=version)
    stash.end_step, stash.drop_step = finished, dropped


@pytest.mark.parametrize("again", ["the same call", "what comes next"])
def test_a_step_that_is_cut_short_anywhere_is_finished_by_the_next_call(again):
    def build() -> Any:
        made = ring(versions=3)
        _, stash, optimizer = made
        for t in range(3):
            give(stash, t, t)
            optimizer.step(version=t)
        give(stash, 2, 7)
        passed(stash, optimizer, 2)
        return made

    def found(stash: WeightStash) -> list[Tensor]:
        older = [row[name] for row in stash.state_dict()["older"] for name in row]
        return [*weights(stash), *older]

    _, stash, _ = build()
    stash.end_step(2, 1)
    expected = found(stash)
    lines = 0
    while True:
        module, stash, _ = build()
        try:
            with Interrupted(lines) as interrupted:
                stash.end_step(2, 1)
        except KeyboardInterrupt:
            pass
        sys.settrace(None)
        if again == "the same call" or stash.newest == 3:
            stash.end_step(2, 1)
        with torch.no_grad(), stash.use(stash.newest):
            assert all(p is q for p, q in zip(module.parameters(), stash.parameters(4).values(), strict=True))
        same(found(stash), expected)
        if not interrupted.raised:
            break
        lines += 1
    assert lines > 20


class Again(nn.Module):
    """Runs its parts again in backward; ``reads`` says how the function that runs again gets at its weights."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.inner, self.reads = stage(), reads

    def forward(self, x: Tensor) -> Tensor:
        if self.reads == "nothing":
            return self.inner(x)
        if self.reads == "module":
            return checkpoint(self.inner, x, use_reentrant=False)
        first, _, norm, last = self.inner

        def parts(x: Tensor) -> Tensor:
            hidden = torch.tanh(torch.addmm(first.bias, x, first.weight.t()))
            return nn.functional.linear(nn.functional.layer_norm(hidden, (40,), norm.weight, norm.bias), last.weight)

        return checkpoint(parts, x, use_reentrant=self.reads == "reentrant")


@pytest.mark.parametrize("reads", ["nothing", "module", "functions", "reentrant"])
def test_a_backward_in_a_block_decodes_as_a_whole_only_what_is_read_as_a_whole(reads):
    def run(form: str, **options: Any) -> tuple[list[Tensor], WeightStash]:
        module = Again(reads)
        stash = WeightStash(module, 4, old_versions=form, **options)
        optimizer = npp.NAdam(module.parameters(), lr=1e-3, stash=stash)
        waiting, found = [], []
        for m in range(10):
            version = max(0, m - 3) if options else stash.newest
            x = data(m).float().reshape(-1, 8).requires_grad_()
            with stash.use(version):
                waiting.append((version, x, objective(module(x))))
            if options or m >= 3:
                version, x, loss = waiting.pop(0)
                with stash.bind(version):
                    loss.backward()
                for p in stash.parameters(version).values():
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                optimizer.step(version=version)
                found += [loss.detach(), x.grad]
        return found, stash

    found, stash = run(FORM)
    same(found, run(FORM, exact_forward=True)[0][: len(found)])
    assert bool(stash._old._spare) == (reads != "nothing")
    leaves = stash.parameters(stash.newest).values()
    small = 3 * 1.0625 * sum(p.numel() for p in leaves) + max(p.nbytes for p in leaves)
    assert (stash.nbytes < 1.2 * small) == (reads == "nothing")


def test_weights_of_an_older_version_can_be_read_where_it_is_bound():
    module, stash, optimizer = ring()
    for t in range(4):
        give(stash, t, t)
        optimizer.step(version=t)
    with torch.no_grad(), stash.use(2):
        expected = module[0].weight.clone()
    newest = module[0].weight.detach().clone()
    stash.zero_grad()
    with stash.bind(2):
        assert module[0].weight.grad is None
        assert stash._old._shown is None
        assert torch.equal(module[0].weight, expected)
    assert torch.equal(module[0].weight, newest)
    with stash.bind(4):
        assert torch.equal(module[0].weight, newest)
