"""Moments in eight bits and weights in 24 in a pipeline: groups, checkpoints and memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
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


WIDE = {"state_dtype": None, "master_weights": True}


def everything(pipe: VirtualPipeline) -> dict[str, object]:
    return copy.deepcopy(pipe.state_dict())


def tensors(pipe: VirtualPipeline) -> list[torch.Tensor]:
    return [t for t in tree_leaves(everything(pipe)) if isinstance(t, torch.Tensor)]


def test_a_checkpoint_with_wide_state_is_put_in_eight_and_24_bits() -> None:
    wide, small = pipeline(**WIDE), pipeline()
    train(wide, 0, 20)
    small.load_state_dict(everything(wide))
    following = train(wide, 20, 40)
    torch.testing.assert_close(train(small, 20, 40), following, rtol=0.05, atol=0.05)
    for optimizer in small.optimizers:
        assert optimizer is not None
        assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.int8}
        assert not any("master_weight" in s for s in optimizer.state.values())


def halved(state: dict[str, object]) -> dict[str, object]:
    """Return a state as if groups had 64 elements."""
    for stage in state["stages"].values():  # type: ignore[attr-defined]
        for entries in stage["optimizer"]["state"].values():
            entries["exp_avg_scale"] = entries["exp_avg_scale"][::2].clone()
    return state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (WIDE, "is in eight bits, but this optimizer has wider moments; load what widened_state_dict"),
        ({"state_dtype": torch.float32, "master_weights": True}, "were saved|is in eight bits"),
        ({"state_dtype": "8bit", "master_weights": True}, "saved with master_weights='24bit', but this optimizer has"),
        ({}, "needs [0-9]+ float16 scales, one for 32 elements"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_changed(
    options: dict[str, object], message: str
) -> None:
    saved, pipe = pipeline(), pipeline(**options)
    train(saved, 0, 4)
    train(pipe, 0, 3)
    before, state = tensors(pipe), everything(saved)
    with pytest.raises(ValueError, match=message):
        pipe.load_state_dict(state if options else halved(state))
    torch.testing.assert_close(tensors(pipe), before, rtol=0, atol=0)
