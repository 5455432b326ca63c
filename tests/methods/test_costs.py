"""Documented bytes compared with measured ones: the tensors a step depends on and those it changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nesterov_pp as npp
from nesterov_pp.methods.costs import of_step
from nesterov_pp.optim import FusedOptimizer
from nesterov_pp.pipeline import Placement, recipes
from nesterov_pp.pipeline.stage import build_optimizer, build_stash, set_horizon

ONE_PASS = [name for name, recipe in recipes().items() if (c := of_step(recipe)) and c.traffic]
THEORY = {  # bytes per parameter of state and step, from the cost tables of the papers
    "nesterov": (8, 28),
    "pipedream": (8, 28),
    "nesterov-sgd": (4, 20),
    "xpipe": (12, 32),
    "one-step-ef": (12, 32),
    "pipemare": (16, 40),
    "gap-aware": (12, 40),
    "dc-asgd": (8, 32),
    "spectrain": (8, 24),
    "dana-dc": (8, 28),
    "nesterov-horizon": (8, 28),
}


class Step:
    """A step of a stage whose gradient is two versions late, always from the same state."""

    def __init__(self, name: str, backend: str) -> None:
        recipe = recipes()[name]
        torch.manual_seed(0)
        self.module = nn.ParameterList([torch.randn(64)])
        self.stash = build_stash(recipe, self.module, 3)
        place = Placement(1, 3, 2)
        optimizer = build_optimizer(
            recipe, self.module, self.stash, place, lr=1e-2, max_grad_norm=None, backend=backend
        )
        assert isinstance(optimizer, FusedOptimizer)
        self.optimizer = optimizer
        for _ in range(5):
            for p in self.stash.parameters(self.stash.oldest).values():
                p.grad = torch.randn(64)
            set_horizon(optimizer, recipe, place, 10_000)
            optimizer.step(version=self.stash.oldest)
        for p in self.stash.parameters(self.stash.oldest).values():
            p.grad = torch.randn(64)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all float32 tensors of the parameter's size that the step may read or write."""
        stash, (state,) = self.stash, self.optimizer.state.values()
        (late,) = stash.parameters(stash.oldest).values()
        found = {f"version {v}": p for v in (3, 4, 5) for p in stash.parameters(v).values()}
        found |= {f"shadow {n}": p for n, p in stash.state_dict().get("shadow", {}).items()}
        found |= {n: t for n, t in state.items() if t.numel() == 64}
        assert late.grad is not None
        return {n: t.detach() for n, t in found.items()} | {"grad": late.grad}


def result(name: str, backend: str, change: str | None = None) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Change one tensor, step, and return all tensors and the names of those that the step changed."""
    step = Step(name, backend)
    tensors = step.tensors()
    if change is not None:
        tensors[change].mul_(1.01).add_(1e-3)
    before = {n: t.clone() for n, t in tensors.items()}
    step.optimizer.step(version=step.stash.oldest)
    return tensors, {n for n, t in tensors.items() if not torch.equal(t, before[n])}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ONE_PASS)
def test_a_step_reads_and_writes_what_is_counted(name, backend):
    after, written = result(name, backend)
    read = set()
    for n in after:
        other, _ = result(name, backend, n)
        # An untouched tensor keeps the change made to it above; this does not count as a read.
        if any(not torch.equal(other[k], after[k]) for k in after if k != n or k in written):
            read.add(n)
    cost = of_step(recipes()[name])
    assert cost is not None
    # The weights are read from one tensor and written to another: a slot, or its shadow.
    assert 4 * (len(read) + len(written)) == cost.traffic, (sorted(read), sorted(written))
    assert (cost.state, cost.traffic) == THEORY.get(name, tuple(cost))


@pytest.mark.parametrize("name", ONE_PASS)
def test_a_stage_keeps_what_is_counted(name):
    step = Step(name, "auto")
    (state,) = step.optimizer.state.values()
    held = sum(t.numel() * t.element_size() for n, t in state.items() if n.startswith("exp_avg"))
    held += sum(t.numel() * t.element_size() for t in step.stash.state_dict().get("shadow", {}).values())
    cost = of_step(recipes()[name])
    assert cost is not None
    assert held / 64 == cost.state


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("weights", "options", "state", "traffic"),
    [  # with two moments: the bytes of docs/kernels.md
        (torch.float32, {"state_dtype": BF16}, 4, 20),
        (torch.float32, {"master_weights": True}, 8, 28),
        (BF16, {}, 4, 14),
        (BF16, {"state_dtype": torch.float32}, 8, 22),
        (BF16, {"master_weights": True}, 12, 28),
        (BF16, {"master_weights": True, "state_dtype": BF16}, 8, 20),
        (torch.float32, {"state_dtype": "8bit"}, 2.125, 16.25),
        (BF16, {"master_weights": "24bit"}, 9, 24),
        (BF16, {"master_weights": "24bit", "state_dtype": "8bit"}, 3.125, 12.25),
    ],
)
@pytest.mark.parametrize("name", ["nesterov", "gap-aware", "xpipe", "pipemare", "nesterov-sgd", "nesterov-rotated"])
def test_bytes_of_other_dtypes(name, weights, options, state, traffic):
    if name == "nesterov-rotated" and "state_dtype" in options:
        pytest.skip("its state is float32")
    small = "8bit" in options.values() or "24bit" in options.values()
    if small and name not in ("nesterov", "nesterov-sgd"):
        pytest.skip("a correction, a prediction or a rotation keeps wider state")
    recipe = recipes()[name].override(options)
    torch.manual_seed(0)
    module = nn.ParameterList([torch.randn(64, 64).to(weights)])
    stash = build_stash(recipe, module, 3)
    optimizer = build_optimizer(recipe, module, stash, Placement(1, 3, 2), lr=1e-2, max_grad_norm=None, backend="auto")
    assert optimizer is not None
    (kept,) = optimizer.state.values()
    held = [t for t in [*kept.values(), *stash.state_dict().get("shadow", {}).values()] if t.dim() > 0]
    cost = of_step(recipe, weights)
    assert cost is not None
    assert sum(t.numel() * t.element_size() for t in held) == 64 * 64 * cost.state
    if name == "nesterov":
        assert cost == (state, traffic)


def test_a_rotated_rule_keeps_what_is_counted():
    recipe = recipes()["nesterov-rotated"]
    optimizer = recipe.rule([nn.Parameter(torch.randn(128, 192))], lr=1e-2, **recipe.options)
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.randn(128, 192)
    optimizer.step()
    held = sum(t.numel() * t.element_size() for t in optimizer.state[p].values() if t.dim() > 0)
    cost = of_step(recipe)
    assert cost is not None
    assert (held / p.numel(), cost.traffic) == (cost.state, None)


def test_what_is_no_single_pass_says_so():
    assert {name for name in recipes() if name not in ONE_PASS} == {
        "basis-rotation",
        "basis-rotation-1st-uni",
        "fft-forecast",
        "gpipe-1-muon",
        "gpipe-1-rotated",
        "gpipe-1-rotated-nadam",
        "gpipe-muon",
        "gpipe-rotated",
        "gpipe-rotated-nadam",
        "nesterov-rotated",
        "one-step-ef-muon",
        "pipedream-rotated",
        "poly-forecast",
    }
    assert npp.methods.NESTEROV.distributed
