"""The optimizers next to those of torch; NAG next to torch's SGD, of which it is a rescaling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tolerances import MANY_STEPS

import nesterov_pp as npp

SHARED = ["NAdam", "AdamW"]
ALL = ["NAdam", "AdamW", "NAG"]
SHAPES = [(4, 3), (5,), (2, 2, 2)]
GAMMA = 0.9
# NAG's m is (1 - gamma) times the buffer of torch's SGD(nesterov=True), so torch's rate is (1 - gamma) times ours.
# With foreach, the default on GPUs, torch's overwrites the gradients.
TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "NAdam": torch.optim.NAdam,
    "AdamW": torch.optim.AdamW,
    "NAG": lambda ps, lr=1e-3, **options: torch.optim.SGD(
        ps, lr=lr * (1 - GAMMA), momentum=GAMMA, nesterov=True, foreach=False, **options
    ),
}
OURS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "NAdam": npp.NAdam,
    "AdamW": npp.AdamW,
    "NAG": lambda ps, **options: npp.NAG(ps, momentum=GAMMA, **options),
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "NAdam": [
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"maximize": True, "lr": 0.05},
        {"betas": (0.99, 0.9), "momentum_decay": 0.1},
    ],
    "AdamW": [{"weight_decay": 0.3}, {"maximize": True, "lr": 0.05}, {"betas": (0.5, 0.7), "eps": 1e-2}],
    "NAG": [{}, {"maximize": True}],
}
CASES = [(name, options) for name, cases in OPTIONS.items() for options in cases]
"""Names with options that change the result of a step."""


def values(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(v) for v in values(dtype, seed)]


def give(ps, t: int) -> None:
    generator = torch.Generator().manual_seed(1000 + t)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def detached(ps) -> list[torch.Tensor]:
    return [p.detach() for p in ps]


def assert_same_as_torch(name: str, scenario: Callable[[Callable[..., Any]], Any], **ours: Any) -> None:
    """Compare ``scenario(make)``, which builds an optimizer with ``make``, uses it and returns tensors, with torch.

    Under a default device torch keeps its step counts there.
    """
    mine, theirs = scenario(lambda ps, **o: OURS[name](ps, **o, **ours)), scenario(TORCH[name])
    dtype = torch.promote_types(torch.float32, torch.tensor(0.0).dtype)
    torch.testing.assert_close(mine, theirs, check_stride=False, check_device=False, **MANY_STEPS[dtype])


def assert_bits(ps, qs) -> None:
    for p, q in zip(ps, qs, strict=True):
        assert torch.equal(p, q), f"{p} and {q}"
