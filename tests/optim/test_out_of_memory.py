"""Running out of memory while state is allocated leaves everything unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nesterov_pp as npp
from nesterov_pp.optim import fresh


class Exhausted:
    """A callable that works for ``good`` calls and then runs out of memory."""

    def __init__(self, call, good: int) -> None:
        self.call, self.good = call, good

    def __call__(self, *args, **kwargs):
        if self.good == 0:
            raise torch.OutOfMemoryError("no memory left")
        self.good -= 1
        return self.call(*args, **kwargs)


@pytest.mark.parametrize("good", [0, 1])
def test_in_the_constructor(monkeypatch, good):
    ps = [nn.Parameter(torch.ones(n)) for n in (3, 4)]
    monkeypatch.setattr(fresh, "zeros_like", Exhausted(fresh.zeros_like, good))
    with pytest.raises(torch.OutOfMemoryError):
        npp.NAdam(ps)
    assert all(torch.equal(p, torch.ones_like(p)) for p in ps)


@pytest.mark.parametrize("good", [0, 1])
def test_for_another_group(monkeypatch, good):
    first, second = (nn.Parameter(torch.ones(n)) for n in (3, 4))
    optimizer = npp.NAdam([first])
    with monkeypatch.context() as patch:
        patch.setattr(fresh, "zeros_like", Exhausted(fresh.zeros_like, good))
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.add_param_group({"params": [second]})
    assert len(optimizer.param_groups) == 1
    assert second not in optimizer.state
    optimizer.add_param_group({"params": [second]})
    second.grad = torch.ones(4)
    optimizer.step()
    assert bool((second < 1).all())


def test_for_masters(monkeypatch):
    ps = [nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (3, 4)]
    optimizer = npp.NAdam(ps, lr=0.1, master_weights=True)
    for p in ps:
        optimizer.state[p].pop("master_weight", None)
        p.grad = torch.ones_like(p)
    with monkeypatch.context() as patch:
        patch.setattr(fresh, "_master", Exhausted(fresh._master, 1))
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    for p in ps:
        assert "master_weight" not in optimizer.state[p]
        assert torch.equal(p, torch.ones_like(p))
        assert float(optimizer.state[p]["step"]) == 0.0
    optimizer.step()
    assert all(bool((p < 1).all()) for p in ps)
