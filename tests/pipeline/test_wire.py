"""Messages in fewer bits: how far a number moves, what is left alone, and what the emulation makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy import microbatch, model

from nesterov_pp.pipeline import VirtualPipeline
from nesterov_pp.pipeline.wire import (
    GROUP,
    across,
    decode,
    encode,
    is_coded,
    memory_like,
    message_bytes,
    pack,
    pack_gradients,
    unpack,
    unpack_gradients,
)

WIRES = ("bfloat16", "int8")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def there(tensor: torch.Tensor, wire: str) -> torch.Tensor:
    return decode(encode(tensor, wire), tensor.shape, tensor.dtype)


@pytest.mark.parametrize("shape", [(), (1,), (31,), (32,), (5, 33), (0, 7), (2, 3, 64)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_moves_a_number_by_half_a_unit_of_its_group(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    found = there(x, "int8")
    assert (found.shape, found.dtype) == (x.shape, dtype)
    flat, moved = x.double().reshape(-1), (found.double() - x.double()).abs().reshape(-1)
    for group, errors in zip(flat.split(GROUP), moved.split(GROUP), strict=True):
        if len(group):
            largest = float(group.abs().max())
            assert float(errors.max()) <= largest * (0.5 / 127 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.bool])
@pytest.mark.parametrize("count", [0, 1, 64, 65])
def test_sizes(wire: str, dtype: torch.dtype, count: int) -> None:
    x = torch.zeros(count).to(dtype)
    sent = encode(x, wire) if is_coded(dtype, wire) else [x]
    assert sum(part.nbytes for part in sent) == message_bytes(x.nbytes, dtype, wire)
    assert [(m.shape, m.dtype) for m in memory_like(x, wire)] == [(part.shape, part.dtype) for part in sent]


def test_a_kilobyte_in_float32() -> None:
    assert message_bytes(1024, torch.float32, "int8") == 256 + 4 * 8
    assert message_bytes(1024, torch.float32, "bfloat16") == 512
    assert message_bytes(1024, torch.bfloat16, "bfloat16") == 1024
    assert message_bytes(1024, torch.float32, None) == 1024


@pytest.mark.parametrize("value", [0.0, 1e-45, 2.5e-43, 1e-38, 1.0, 3e38])
def test_extreme_groups(value: float) -> None:
    x = torch.full((40,), value)
    x[::3] *= -1
    found = there(x, "int8")
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found, x, rtol=1e-2 if value > 1e-38 else 1.0, atol=0.0)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(wire: str, bad: float) -> None:
    x = torch.ones(64)
    x[3] = bad
    found = there(x, wire)
    assert not torch.isfinite(found[3])
    assert bool(torch.isfinite(found[GROUP:]).all())


@pytest.mark.parametrize("wire", WIRES)
def test_a_nest_arrives_with_everything_that_carries_no_gradient_untouched(wire: str) -> None:
    x = torch.randn(3, 50, requires_grad=True)
    nest = {"hidden": x.t() * 1.0, "mask": torch.rand(4), "rest": ([torch.arange(3)], None, "word")}
    found = unpack(pack(nest, wire), wire)
    assert found["hidden"].requires_grad
    assert torch.equal(found["hidden"], there(x.detach().t(), wire))
    assert torch.equal(found["mask"], nest["mask"])
    assert torch.equal(found["rest"][0][0], torch.arange(3))
    assert found["rest"][1:] == (None, "word")
    assert pack(nest, None) is nest
    gradients = [torch.randn(7, 9), torch.randn(4).bfloat16()]
    back = unpack_gradients(pack_gradients(gradients, wire), gradients, wire)
    assert torch.equal(back[0], there(gradients[0], wire))
    assert torch.equal(back[1], there(gradients[1], wire) if wire == "int8" else gradients[1])


@pytest.mark.parametrize("wire", WIRES)
def test_a_boundary_codes_values_and_gradients(wire: str) -> None:
    x = torch.randn(6, 40, requires_grad=True)
    output = across((x * 2.0, torch.ones(3)), wire)
    weights = torch.randn(6, 40)
    (output[0] * weights).sum().backward()
    assert torch.equal(output[0], there(2.0 * x.detach(), wire))
    assert torch.equal(output[1], torch.ones(3))
    assert x.grad is not None
    assert torch.equal(x.grad, 2.0 * there(weights, wire))


def test_gradients_of_the_weights_stay_close() -> None:
    """They are those of the uncoded pipeline up to the coding's error."""

    def gradients(wire: str | None) -> list[torch.Tensor]:
        stages = model(4, dtype=torch.float32)
        pipe = VirtualPipeline(stages, F.cross_entropy, "gpipe-1", 0.0, wire=wire)  # type: ignore[arg-type]
        pipe.step(*microbatch(0))
        return [state["exp_avg"] for optimizer in pipe.optimizers if optimizer for state in optimizer.state.values()]

    whole = torch.cat([g.flatten() for g in gradients(None)])
    for wire, most in (("bfloat16", 0.02), ("int8", 0.04)):
        coded = torch.cat([g.flatten() for g in gradients(wire)])
        assert 0.0 < float((coded - whole).norm() / whole.norm()) < most


def test_refusals() -> None:
    stages = [nn.Linear(3, 3), nn.Linear(3, 3)]
    with pytest.raises(ValueError, match='wire must be "bfloat16", "int8" or None, not \'int4\''):
        VirtualPipeline(stages, F.mse_loss, wire="int4")  # type: ignore[arg-type]
    saved = VirtualPipeline(stages, F.mse_loss, wire="int8").state_dict()
    with pytest.raises(ValueError, match="the saved pipeline has wire 'int8', this one None"):
        VirtualPipeline(stages, F.mse_loss).load_state_dict(saved)
