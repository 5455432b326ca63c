"""Losses that are sums with a weight, and gradients clipped by the norm of the whole pipeline."""

from __future__ import annotations

from typing import Any

import nests
import pytest
import torch
from tolerances import MANY_STEPS
from torch import Tensor
from torch.nn import functional as F
from toy import microbatch, model

from nesterov_pp.pipeline import VirtualPipeline

F64 = torch.float64
ADAMW: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def assert_same_weights(found: VirtualPipeline, wanted: list[torch.nn.Module]) -> None:
    for ours, theirs in zip(found.stages, wanted, strict=True):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, **MANY_STEPS[p.dtype])


def with_labels(m: int, valid: int) -> tuple[Tensor, Tensor]:
    """Return a microbatch of which only the first labels are valid."""
    x, y = microbatch(m)
    return x, torch.where(torch.arange(len(y)) < valid, y, nests.IGNORED)


def sum_and_weight(output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(output, targets, reduction="sum"), (targets != nests.IGNORED).sum()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_unequal_microbatches_equal_one_large_one(k: int) -> None:
    """Also where one of them has no valid label at all."""
    counts = [1, 8, 0]
    parts = VirtualPipeline(model(2), sum_and_weight, "gpipe", lr=1e-2, microbatches_per_update=k)
    whole = VirtualPipeline(model(2), F.cross_entropy, "gpipe-1", lr=1e-2)
    for update in range(20):
        several = [with_labels(k * update + j, counts[(update + j) % 2 if k == 1 else j]) for j in range(k)]
        losses = [float(parts.step(*one)) for one in several]
        x, y = (torch.cat(pair) for pair in zip(*several, strict=True))
        large = float(whole.step(x, y))
        weights = [int((y != nests.IGNORED).sum()) for _, y in several]
        mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
        assert mean == pytest.approx(large, rel=MANY_STEPS[F64]["rtol"])
    assert_same_weights(parts, whole.stages)


def test_a_weight_for_some_microbatches_only_is_refused() -> None:
    def loss_fn(output: Tensor, targets: Tensor) -> Any:
        loss = F.cross_entropy(output, targets)
        return loss if targets[0] == microbatch(0)[1][0] else (loss, 1.0)

    pipe = VirtualPipeline(model(2), loss_fn, "gpipe", microbatches_per_update=8)
    pipe.step(*microbatch(0))
    other = next(m for m in range(99) if microbatch(m)[1][0] != microbatch(0)[1][0])
    with pytest.raises(ValueError, match="loss_fn must return a weight for every microbatch of an update, or for none"):
        pipe.step(*microbatch(other))


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            torch.zeros(3),
            r"loss_fn must return a 0-d tensor \(a mean\), or such a sum and its weight, not shape \(3,\)",
        ),
        ("loss", "loss_fn must return a 0-d tensor .* not str"),
        ((torch.tensor(1.0), -2.0), "weight that loss_fn returns must be a finite number of at least 0, not -2.0"),
        ((torch.tensor(1.0), float("nan")), "weight that loss_fn returns must be a finite number"),
    ],
)
def test_what_is_no_loss_is_refused(found: Any, sentence: str) -> None:
    pipe = VirtualPipeline(model(2), lambda _output, _targets: found)
    with pytest.raises(ValueError, match=sentence):
        pipe.step(*microbatch(0))


def test_clipping_over_a_pipeline_of_one_stage_is_clipping_over_the_stage() -> None:
    one, other = (
        VirtualPipeline(model(2)[:1], lambda y, _: y.square().sum(), lr=1e-2, max_grad_norm=0.1, clip_over=over)
        for over in ("pipeline", "stage")
    )
    for m in range(20):
        one.step(*microbatch(m))
        other.step(*microbatch(m))
    assert_same_weights(one, other.stages)


def test_clipping_uses_this_updates_norms_of_later_stages_and_the_last_ones_of_earlier_stages() -> None:
    """Compare with a plain loop: without delay, the norms of earlier stages are those of the update before."""
    limit, modules = 0.3, model(3)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, **ADAMW) for m in modules]
    pipe = VirtualPipeline(model(3), F.cross_entropy, "gpipe-1", lr=1e-2, max_grad_norm=limit, clip_over="pipeline")
    before, exact, used = [0.0] * 3, [], []
    for m in range(30):
        x, y = microbatch(m)
        hidden = x
        for module in modules:
            hidden = module(hidden)
        F.cross_entropy(hidden, y).backward()
        squares = [sum(float(p.grad.square().sum()) for p in module.parameters()) for module in modules]
        for i, module in enumerate(modules):
            norm = (sum(before[:i]) + sum(squares[i:])) ** 0.5
            used.append(norm)
            exact.append(sum(squares) ** 0.5)
            for p in module.parameters():
                p.grad *= min(1.0, limit / (norm + 1e-6))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        before = squares
        pipe.step(x, y)
    assert_same_weights(pipe, modules)
    # After the first update, the norm that is used is close to the exact one.
    assert all(0.5 < u / e < 2.0 for u, e in zip(used[3:], exact[3:], strict=True))


def test_a_resumed_pipeline_clips_by_the_same_norms() -> None:
    def fresh() -> VirtualPipeline:
        return VirtualPipeline(model(3), F.cross_entropy, lr=1e-2, max_grad_norm=0.3, clip_over="pipeline")

    whole, first, second = fresh(), fresh(), fresh()
    losses = [float(whole.step(*microbatch(m))) for m in range(20)]
    for m in range(10):
        first.step(*microbatch(m))
    second.load_state_dict(first.state_dict())
    assert [float(second.step(*microbatch(m))) for m in range(10, 20)] == losses[10:]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"clip_over": "all"}, "clip_over must be 'stage' or 'pipeline', not 'all'"),
        ({"clip_over": "pipeline"}, "clip_over='pipeline' needs a max_grad_norm above 0, not None"),
    ],
)
def test_bad_clipping_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        VirtualPipeline(model(2), F.cross_entropy, **options)
