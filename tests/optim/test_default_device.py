"""``torch.set_default_device`` affects only the user's tensors; the package creates its own where they are needed."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from backends import BACKENDS
from torch import nn

import nesterov_pp as npp

CASES = [
    {},
    {"max_grad_norm": 1.0},
    {"on_nonfinite": "raise"},
    {"state_dtype": torch.bfloat16, "stochastic_rounding": True},
]


def trained(kind, elsewhere: bool, **options) -> list[torch.Tensor]:
    """Return weights and norm; with ``elsewhere``, the default device is one whose tensors have no values."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    module = nn.Linear(7, 33)
    grads = [[torch.randn(p.shape, generator=generator) for p in module.parameters()] for _ in range(6)]
    with torch.device("meta") if elsewhere else contextlib.nullcontext():
        stash = npp.WeightStash(module, versions=2)
        optimizer = kind(module.parameters(), lr=1e-2, stash=stash, **options)
        for step, each in enumerate(grads):
            for leaf, grad in zip(stash.parameters(stash.newest).values(), each, strict=True):
                leaf.grad = grad
            optimizer.step()
            if step == 3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    norm = optimizer.last_grad_norm
    return [*(p.detach() for p in module.parameters()), *([] if norm is None else [norm])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("kind", [npp.NAdam, npp.AdamW, npp.NAG, npp.Lion])
def test_a_step_is_the_same(kind, options, backend):
    ours = trained(kind, True, backend=backend, **options)
    assert all(map(torch.equal, ours, trained(kind, False, backend=backend, **options)))
