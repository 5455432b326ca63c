"""Moments in eight bits and weights in 24 in a pipeline: groups, checkpoints and memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy import microbatch, model

from nesterov_pp.pipeline import VirtualPipeline

pytestmark = pytest.mark.usefixtures("one_thread")


def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets)


def pipeline(**options: object) -> VirtualPipeline:
    small = {"state_dtype": "8bit", "master_weights": "24bit", **options}
    return VirtualPipeline(model(3, dtype=torch.bfloat16), loss, lr=1e-2, **small)  # type: ignore[arg-type]


def train(pipe: VirtualPipeline, first: int, last: int) -> list[float]:
    return [float(pipe.step(*microbatch(m))) for m in range(first, last)]


def test_runs_learn_and_resume_bit_for_bit() -> None:
    whole = pipeline()
    losses = train(whole, 0, 60)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    half = pipeline()
    train(half, 0, 30)
    saved = copy.deepcopy(half.state_dict())
    resumed = pipeline()
    resumed.load_state_dict(saved)
    assert train(resumed, 30, 60) == losses[30:]


def test_stages_draw_different_noise() -> None:
    seeds = [optimizer.options.seed for optimizer in pipeline(seed=3).optimizers if optimizer is not None]
    assert len(set(seeds)) == 3


def test_embeddings_stay_wide_in_a_group_of_their_own() -> None:
    def groups(stage: nn.Module) -> list[dict[str, object]]:
        wide = {id(p) for m in stage.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        return [
            {"params": [p for p in stage.parameters() if id(p) in wide], "state_dtype": torch.float32},
            {"params": [p for p in stage.parameters() if id(p) not in wide]},
        ]

    pipe = pipeline(param_groups=groups)
    train(pipe, 0, 4)
    for optimizer in pipe.optimizers:
        assert optimizer is not None
        for group in optimizer.param_groups:
            wanted = group.get("state_dtype", torch.int8)
            assert {optimizer.state[p]["exp_avg"].dtype for p in group["params"]} <= {wanted}


def test_rules_that_keep_wider_state_refuse() -> None:
    for method, message in (
        ("gap-aware", "cannot be combined with a correction or a prediction"),
        ("nesterov-rotated", "has no state_dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            VirtualPipeline(model(3, dtype=torch.bfloat16), loss, method=method, lr=1e-2, state_dtype="8bit")
    with pytest.raises(ValueError, match="float32 master weights or none"):
        VirtualPipeline(
            model(3, dtype=torch.bfloat16), loss, method="nesterov-rotated", lr=1e-2, master_weights="24bit"
        )
