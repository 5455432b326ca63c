"""Layers are timed without a trace of it, whatever they exchange."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nesterov_pp.pipeline.partition import measured_costs


class Doubled(nn.Module):
    """Takes and returns a dict, and works in place."""

    def forward(self, given: Any) -> Any:
        if isinstance(given, Tensor):
            return {"hidden": given, "ids": torch.ones(3, dtype=torch.int64)}
        return {**given, "hidden": given["hidden"].mul_(2.0)}


def test_a_convolutional_network_with_layers_in_place() -> None:
    torch.manual_seed(0)
    block = (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(0.5))
    net = nn.Sequential(*block, nn.Flatten(), nn.Linear(3 * 64, 2))
    x = torch.randn(4, 3, 8, 8)
    before, inputs = [t.clone() for t in (*net.parameters(), *net.buffers())], x.clone()
    drawn = torch.random.get_rng_state()
    costs = measured_costs(net, x)
    assert len(costs) == len(net)
    assert min(costs) > 0
    assert all(map(torch.equal, before, (*net.parameters(), *net.buffers())))
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(x, inputs)
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_layers_that_exchange_nests() -> None:
    hidden = torch.ones(2, requires_grad=True)
    assert len(measured_costs(nn.Sequential(Doubled(), Doubled(), Doubled()), hidden)) == 3
    assert torch.equal(hidden.detach(), torch.ones(2))
