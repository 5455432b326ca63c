"""Optimizers that are copied, pickled and saved, compared with torch's."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from parity import (
    ALL,
    OURS,
    assert_bits,
    give,
    parameters,
)

import nesterov_pp as npp


class Counting(npp.NAdam):
    """A subclass with its own attributes, as users write them."""

    def __init__(self, params, factor: float, **options: Any) -> None:
        super().__init__(params, **options)
        self.factor = factor
        self.count = 0

    def step(self, closure=None, **options):
        self.count += 1
        return super().step(closure, **options)

    def __getstate__(self):
        return {**super().__getstate__(), "factor": self.factor, "count": self.count}


def through_torch_save(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda o: pickle.loads(pickle.dumps(o)), "save": through_torch_save}


@pytest.mark.parametrize("way", COPIES)
def test_a_subclass_keeps_its_attributes_through_copies(way):
    ps = parameters()
    optimizer = Counting(ps, 0.5, lr=0.02, max_grad_norm=1.0)
    give(ps, 0)
    optimizer.step()
    copied = COPIES[way](optimizer)
    assert (type(copied), copied.factor, copied.count) == (Counting, 0.5, 1)
    qs = copied.param_groups[0]["params"]
    give(ps, 1)
    give(qs, 1)
    optimizer.step()
    copied.step()
    assert (optimizer.count, copied.count) == (2, 2)
    assert_bits(ps, qs)


def falling(t: int) -> float:
    return 0.9 / t


@pytest.mark.parametrize("way", COPIES)
def test_nag_keeps_its_schedule_through_copies(way):
    ps = parameters()
    optimizer = npp.NAG(ps, lr=0.1, momentum=falling)
    for t in range(3):
        give(ps, t)
        optimizer.step()
    copied = COPIES[way](optimizer)
    qs = copied.param_groups[0]["params"]
    for t in range(3, 6):
        give(ps, t)
        give(qs, t)
        optimizer.step()
        copied.step()
    assert_bits(ps, qs)
    assert copied.param_groups[0]["momentum"] == falling(6)


@pytest.mark.parametrize("name", ALL)
def test_a_model_and_its_optimizer_copied_together_belong_together(name):
    model = torch.nn.Linear(3, 2)
    optimizer = OURS[name](model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    both = copy.deepcopy([model, optimizer])
    for net, o in ([model, optimizer], both):
        o.zero_grad()
        net(torch.ones(1, 3)).square().sum().backward()
        o.step()
    assert both[1].param_groups[0]["params"][0] is both[0].weight
    assert both[0].weight is not model.weight
    assert_bits(model.parameters(), both[0].parameters())


@pytest.mark.parametrize("name", ALL)
def test_extra_keys_of_groups_are_kept(name):
    optimizer = OURS[name]([{"params": parameters(), "initial_lr": 0.5, "tag": "mine"}])
    again = OURS[name](parameters())
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["tag"] == "mine"
    assert again.param_groups[0]["initial_lr"] == 0.5
