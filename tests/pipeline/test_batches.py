"""Microbatches from a loader: by number, in the same order everywhere, and from any position."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from nesterov_pp.pipeline import Batches

ITEMS, SIZE = 22, 4
EPOCH = 6  # batches, the last one short


def loader(**options: Any) -> DataLoader[Any]:
    data = TensorDataset(torch.arange(ITEMS), torch.arange(ITEMS) % 3)
    return DataLoader(data, batch_size=SIZE, **{"shuffle": True, **options})


class Stateful:
    """A loader that knows its position and restores it, as torchdata's StatefulDataLoader does."""

    def __init__(self) -> None:
        self.epochs_begun, self._next, self._order = 0, 0, torch.empty(0)
        self._resumed = False

    def __iter__(self) -> Iterator[Any]:
        if not self._resumed:
            self._order, self._next = torch.randperm(ITEMS), 0
        self.epochs_begun, self._resumed = self.epochs_begun + 1, False
        while self._next + SIZE <= ITEMS:
            self._next += SIZE
            yield self._order[self._next - SIZE : self._next], torch.zeros(SIZE)

    def state_dict(self) -> dict[str, Any]:
        return {"order": self._order, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order, self._next, self._resumed = state["order"], state["next"], True


def taken(batches: Batches, numbers: range) -> list[list[int]]:
    return [batches(m)[0].tolist() for m in numbers]


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_epochs_of_a_shuffled_loader() -> None:
    torch.manual_seed(0)
    found = taken(Batches(loader(), seed=3), range(2 * EPOCH))
    first, second = found[:EPOCH], found[EPOCH:]
    assert [sorted(chain.from_iterable(epoch)) for epoch in (first, second)] == [list(range(ITEMS))] * 2
    assert first != second
    torch.manual_seed(1)
    torch.rand(5)
    before = torch.get_rng_state()
    assert taken(Batches(loader(), seed=3), range(2 * EPOCH)) == found
    assert torch.equal(torch.get_rng_state(), before)
    assert taken(Batches(loader(), seed=4), range(EPOCH)) != first


@pytest.mark.parametrize("make", [loader, Stateful, lambda: loader(generator=torch.Generator().manual_seed(5))])
@pytest.mark.parametrize("done", [0, 1, EPOCH - 1, EPOCH, EPOCH + 2, 3 * EPOCH])
def test_any_position_is_gone_on_from(make: Any, done: int) -> None:
    batches = Batches(make())
    taken(batches, range(done))
    state = through_a_file(batches.state_dict())
    wanted = taken(batches, range(done, done + EPOCH + 2))
    resumed = Batches(make())
    resumed.load_state_dict(state)
    assert taken(resumed, range(done, done + EPOCH + 2)) == wanted


@pytest.mark.parametrize("make", [loader, Stateful])
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_what_was_taken_ahead_comes_again(make: Any, ahead: int) -> None:
    done = EPOCH - 1
    batches = Batches(make(), window=4)
    wanted = taken(batches, range(done + ahead))[done:]
    state = through_a_file(batches.state_at(done))
    wanted += taken(batches, range(done + ahead, done + 8))
    resumed = Batches(make(), window=4)
    resumed.load_state_dict(state)
    assert taken(resumed, range(done, done + 8)) == wanted


@pytest.mark.parametrize("make", [loader, Stateful])
@pytest.mark.parametrize("ahead", [0, 2])
def test_replicas_go_on_from_the_position_of_the_first(make: Any, ahead: int) -> None:
    """Replica r of R takes the numbers ``m R + r``; the first saves the position for all."""
    replicas, done = 3, 4
    wanted = taken(Batches(make()), range(8 * replicas))
    first = Batches(make(), window=4 * replicas)
    for m in range(done + ahead):
        first(m * replicas)
    state = through_a_file(first.state_at(done * replicas))
    for r in range(replicas):
        resumed = Batches(make(), window=4 * replicas)
        resumed.load_state_dict(state)
        for m in range(done, 8):
            assert resumed(m * replicas + r)[0].tolist() == wanted[m * replicas + r]


def test_a_stateful_loader_is_not_read_again() -> None:
    batches = Batches(Stateful())
    taken(batches, range(3))
    other = Stateful()
    resumed = Batches(other)
    resumed.load_state_dict(batches.state_dict())
    resumed(3)
    assert (other.epochs_begun, other.state_dict()["next"]) == (1, 4 * SIZE)


def test_a_sampler_is_told_the_epoch() -> None:
    sampler = DistributedSampler(range(ITEMS), num_replicas=1, rank=0, seed=2)  # type: ignore[var-annotated, arg-type]
    batches = Batches(loader(shuffle=False, sampler=sampler))
    found = taken(batches, range(2 * EPOCH))
    assert found[:EPOCH] != found[EPOCH:]
    assert sampler.epoch == 1


def test_only_the_last_ones_can_be_asked_for_again() -> None:
    batches = Batches(loader(), window=2)
    assert batches(4) is batches(4)
    assert batches(3) is not None
    with pytest.raises(ValueError, match="microbatch 2 was asked for after microbatch 4, but only the last 2 can"):
        batches(2)
    with pytest.raises(ValueError, match="the position before microbatch 2 is not known after 5 microbatches"):
        batches.state_at(2)
    with pytest.raises(ValueError, match="window must be at least 1 microbatch, not 0"):
        Batches(loader(), window=0)


def test_loaders_that_end() -> None:
    with pytest.raises(ValueError, match="the loader is empty"):
        Batches([])(0)
    once = Batches(iter([(1, 2), (3, 4)]))
    assert once(1) == (3, 4)
    with pytest.raises(ValueError, match="the loader cannot be iterated again"):
        once(2)
    longer = Batches(loader())
    longer(4)
    with pytest.raises(ValueError, match="the loader ends after 2 of the 5 microbatches that were used before"):
        Batches([(1, 2), (3, 4)]).load_state_dict(longer.state_dict())
