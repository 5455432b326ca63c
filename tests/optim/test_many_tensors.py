"""Lists that are long enough to be checked by several threads, and step counts stored side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import nesterov_pp as npp
from tests.tolerances import MANY_STEPS

MANY = 1500


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def many(count: int = MANY) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    parameters = [nn.Parameter(torch.randn(1 + i % 70, generator=generator)) for i in range(count)]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    return parameters


def test_many_small_tensors_are_stepped_as_torch_does(threads: int) -> None:
    ours, theirs = many(), many()
    ours[7].grad = theirs[7].grad = None
    mine, reference = npp.NAdam(ours, backend="cpu"), torch.optim.NAdam(theirs, foreach=False)
    for _ in range(3):
        mine.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, **MANY_STEPS[torch.float32])
    assert [float(mine.state[p]["step"]) for p in ours] == [0.0 if i == 7 else 3.0 for i in range(MANY)]


def test_the_first_tensor_at_fault_is_named_whichever_thread_meets_one_first(threads: int) -> None:
    parameters = many()
    optimizer = npp.NAdam(parameters, backend="cpu")
    optimizer.step()
    before = [p.detach().clone() for p in parameters]
    for i in (MANY - 1, 900, 411):
        optimizer.state[parameters[i]]["exp_avg"].resize_(3, 5)
    with pytest.raises(ValueError, match="parameter 411 has shape"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    assert float(optimizer.state[parameters[0]]["step"]) == 1.0


@pytest.mark.parametrize("change", ["fill", "data", "set", "replace", "double"])
def test_a_count_that_someone_writes_is_the_count(change: str) -> None:
    ours, theirs = many(3), many(3)
    mine, reference = npp.NAdam(ours, backend="cpu"), torch.optim.NAdam(theirs, foreach=False)
    for optimizer, parameters in ((mine, ours), (reference, theirs)):
        optimizer.step()
        state = optimizer.state[parameters[1]]
        ten = torch.tensor(10.0)
        if change == "fill":
            state["step"].fill_(10.0)
        elif change == "data":
            state["step"].data = ten
        elif change == "set":
            state["step"].set_(ten)
        elif change == "replace":
            state["step"] = ten
        else:
            state["step"] = ten.double()
        optimizer.step()
        assert [float(optimizer.state[p]["step"]) for p in parameters] == [2.0, 11.0, 2.0]
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, **MANY_STEPS[torch.float32])


def test_counts_of_copied_and_loaded_optimizers_are_their_own() -> None:
    parameters = many(3)
    first = npp.NAdam(parameters, backend="cpu")
    first.step()
    loaded = npp.NAdam(many(3), backend="cpu")
    loaded.load_state_dict(first.state_dict())
    copied = copy.deepcopy(first)
    first.step()
    for other in (loaded, copied):
        assert [float(s["step"]) for s in other.state.values()] == [1.0, 1.0, 1.0]
        for p in other.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        other.step()
        assert [float(s["step"]) for s in other.state.values()] == [2.0, 2.0, 2.0]
    assert [float(s["step"]) for s in first.state.values()] == [2.0, 2.0, 2.0]
