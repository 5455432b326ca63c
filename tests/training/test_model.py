"""The GPT model, and how it is cut into stages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tolerances import ONE_STEP
from torch import Tensor, nn

from nesterov_pp.training.model import INIT_STD, build_stages, next_token_loss

SHAPE: dict[str, Any] = {"vocabulary": 50, "layers": 6, "width": 16, "heads": 2, "context": 12, "dropout": 0.0}


def build(stages: int, seed: int = 0, **changes: Any) -> nn.Sequential:
    return nn.Sequential(*build_stages(stages=stages, seed=seed, **{**SHAPE, **changes}))


def leaves(model: nn.Module) -> list[Tensor]:
    """Return all parameters in the order of the layers."""
    return [p.detach() for p in model.parameters()]


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stages", [2, 3, 4, 6])
def test_any_number_of_stages_starts_from_the_same_weights(stages: int) -> None:
    whole, cut = leaves(build(1)), leaves(build(stages))
    assert len(whole) == len(cut)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


@pytest.mark.parametrize("stages", [1, 4, 6])
def test_layers_are_spread_evenly_with_the_ends_outside(stages: int) -> None:
    modules = build_stages(stages=stages, seed=0, **SHAPE)
    assert len(modules) == stages
    kinds = [[type(layer).__name__ for layer in module.children()] for module in modules]
    assert kinds[0][0] == "Embedding"
    assert kinds[-1][-1] == "Head"
    blocks = [names.count("Block") for names in kinds]
    assert sum(blocks) == 6
    assert max(blocks) - min(blocks) <= 1


def test_layers_differ_and_so_do_seeds() -> None:
    first, second = build(1), build(1, seed=1)
    blocks = [layer for layer in first[0].children() if type(layer).__name__ == "Block"]
    weights = [block.get_parameter("feed_in.weight") for block in blocks]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])
    assert not torch.equal(leaves(first)[0], leaves(second)[0])


def test_a_seeds_weights_do_not_depend_on_what_was_drawn_before() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = leaves(build(2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert all(torch.equal(a, b) for a, b in zip(first, leaves(build(2)), strict=True))


def test_first_weights_have_the_stated_spread() -> None:
    model = build(1, width=128, heads=4, layers=2)
    named = dict(model.named_parameters())
    for name, p in named.items():
        if "norm" in name and name.endswith("weight"):
            assert torch.equal(p, torch.ones_like(p))
        elif name.endswith("bias"):
            assert torch.equal(p, torch.zeros_like(p))
        else:
            scaled = name.endswith(("attention_out.weight", "feed_out.weight"))
            std = INIT_STD / math.sqrt(4) if scaled else INIT_STD
            assert p.std().item() == pytest.approx(std, rel=0.1), name


def test_a_position_sees_no_later_token() -> None:
    model = build(3).eval()
    before, after = tokens(), tokens()
    after[:, 7] = (after[:, 7] + 1) % 50
    a, b = model(before), model(after)
    torch.testing.assert_close(a[:, :7], b[:, :7], **ONE_STEP[torch.float32])
    assert ((a[:, 7:] - b[:, 7:]).abs().amax(dim=(0, 2)) > 1e-4).all()


def test_order_matters() -> None:
    model = build(1).eval()
    swapped = tokens()[:, [1, 0, *range(2, 12)]]
    assert not torch.allclose(model(tokens())[:, -1], model(swapped)[:, -1], atol=1e-6)


def test_short_inputs_give_logits_for_each_position() -> None:
    model = build(2).eval()
    short = model(tokens()[:, :5])
    assert short.shape == (2, 5, 50)
    torch.testing.assert_close(short, model(tokens())[:, :5], **ONE_STEP[torch.float32])


def test_attention_is_softmax_of_scaled_products() -> None:
    """Compute attention explicitly for one head and one position, in float64."""
    block = build_stages(stages=1, seed=0, **{**SHAPE, "layers": 1, "heads": 1})[0].double()[1]  # type: ignore[index]
    x = torch.randn(1, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    normed = block.attention_norm(x)
    query, key, value = block.query_key_value(normed)[0].split(16, dim=1)
    weights = torch.softmax(query[2] @ key[:3].T / math.sqrt(16), dim=0)
    after = x[0, 2] + block.attention_out(weights @ value[:3])
    fed = block.feed_out(torch.clamp(block.feed_in(block.feed_norm(after)), min=0))
    torch.testing.assert_close(block(x)[0, 2], after + fed, **ONE_STEP[torch.float64])


def test_dropout_drops_in_training_only() -> None:
    model = build(1, dropout=0.5)
    assert not torch.equal(model(tokens()), model(tokens()))
    assert torch.equal(model.eval()(tokens()), model(tokens()))


def test_an_untrained_model_knows_nothing() -> None:
    loss = next_token_loss(build(1)(tokens()), tokens(1))
    assert loss.dim() == 0
    assert loss.item() == pytest.approx(math.log(50), abs=0.1)
