"""Corrections and predictions to test, and a run of late steps with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import nesterov_pp as npp
from nesterov_pp.optim import DelayCompensation, Discrepancy, FusedOptimizer, GapAware, Prediction

SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 1000, 4097, 70_001]
VERSIONS = 3
CASES: dict[str, dict[str, Any]] = {
    "delay compensation": {"correction": DelayCompensation(0.5)},
    "adaptive delay compensation": {"correction": DelayCompensation(2.0, adaptive=True)},
    "gap": {"correction": GapAware()},
    "displacement": {"prediction": Prediction("displacement")},
    "momentum, damped": {"prediction": Prediction("momentum", damping=0.9)},
    "discrepancy": {"prediction": Discrepancy()},
    "gap and momentum": {"correction": GapAware(decay=0.9), "prediction": Prediction("momentum")},
    "compensation and displacement": {
        "correction": DelayCompensation(2.0, adaptive=True),
        "prediction": Prediction("displacement"),
    },
}
RULES: dict[str, Any] = {
    "NAdam": lambda p, **options: npp.NAdam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True, **options),
    "AdamW": lambda p, **options: npp.AdamW(p, lr=1e-2, **options),
    "Lion": lambda p, **options: npp.Lion(p, lr=1e-2, weight_decay=0.1, **options),
    "NAG": lambda p, **options: npp.NAG(p, lr=1e-1, momentum=0.9, weight_decay=0.1, **options),
}


def run(
    rule: str,
    options: dict[str, Any],
    backend: str,
    dtype: torch.dtype,
    steps: int = 6,
    sizes: list[int] = SIZES,
    device: str | None = None,
) -> tuple[list[torch.Tensor], FusedOptimizer]:
    """Train a ring with gradients as late as it allows; return the ring, shadow and moments after the last step.

    Without ``device`` the tensors are on the default device.
    """
    device = device or str(torch.get_default_device())
    generator = torch.Generator().manual_seed(0)
    module = nn.ParameterList([torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in sizes])
    module.to(device)
    prediction = options.get("prediction")
    stash = npp.WeightStash(module, VERSIONS, shadow=None if prediction is None else prediction.shadow)
    optimizer = RULES[rule](module.parameters(), stash=stash, backend=backend, **options)
    for group in optimizer.param_groups:
        if prediction is not None:
            group["horizon"] = 2.0
    for _ in range(steps):
        late = max(0, stash.newest - VERSIONS + 1)
        for p in stash.parameters(late).values():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(device, dtype)
        optimizer.step(version=late)
    left = [p.detach() for v in range(stash.oldest, stash.newest + 1) for p in stash.parameters(v).values()]
    left += stash.state_dict().get("shadow", {}).values()
    left += [t for s in optimizer.state.values() for n, t in s.items() if n.startswith("exp_avg")]
    return left, optimizer
