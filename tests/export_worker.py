"""One process of a pipeline that trains for a few updates and exports its weights. Usage: export_worker.py FOLDER"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nesterov_pp.pipeline import AsyncPipeline, VirtualPipeline, connect

METHODS = ("nesterov", "nesterov-no-stash", "xpipe", "one-step-ef", "dana-zero")
UPDATES = 6
ENDING = ".safetensors" if find_spec("safetensors") else ".pt"


def build_model() -> nn.Sequential:
    """Return a model with buffers, a layer without parameters, and a frozen layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
    )
    model[3].bias.requires_grad_(False)
    return model


def microbatch(m: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(m))
    return x.to(dtype), x.flip(1).to(dtype)


def exported_alone(method: str) -> dict[str, Any]:
    """Return what the virtual pipeline exports."""
    pipe = VirtualPipeline(build_model(), F.mse_loss, method, lr=1e-2, partition=3)
    for m in range(UPDATES * pipe.microbatches_per_update):
        pipe.step(*microbatch(m))
    return pipe.export() or {}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with connect(timeout=60) as world:
        for method in METHODS:
            for dtype in (torch.float32, torch.bfloat16):
                k = VirtualPipeline(build_model(), F.mse_loss, method, partition=3).microbatches_per_update
                pipe = AsyncPipeline(
                    build_model().to(dtype),
                    F.mse_loss,
                    lambda m, dtype=dtype: microbatch(m, dtype),
                    2 * UPDATES * k,
                    world,
                    method,
                    lr=1e-2,
                    partition="parameters",
                )
                for _ in range(UPDATES * k):
                    pipe.step()
                name = f"{method}-{str(dtype).removeprefix('torch.')}"
                state = pipe.export(folder / f"{name}-weights{ENDING}")
                inputs, _ = microbatch(-1, dtype)
                outputs = pipe.predict(inputs)
                others = world.gather(None if state is None else len(state))
                if state is not None:
                    found = {"state": state, "inputs": inputs, "outputs": outputs, "others": others[1:]}
                    torch.save(found, folder / f"{name}.pt")
                while pipe.microbatches < pipe.total:
                    pipe.step()


if __name__ == "__main__":
    main()
