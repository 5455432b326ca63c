"""Train your own model as an asynchronous pipeline: ``torchrun --nproc-per-node 4 examples/own_model.py``.

Each process trains one stage and writes a checkpoint every 100 updates, from which ``torchrun --max-restarts 3``
resumes. At the end, the trained weights of all stages are one file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import nesterov_pp as npp

UPDATES, EVERY, FOLDER = 400, 100, "runs/own_model"


def batch(m: int) -> tuple[Tensor, Tensor]:
    """Return microbatch ``m``, the same on every call: points, and the sector of the plane that each lies in."""
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(m))
    return x, ((torch.atan2(x[:, 1], x[:, 0]) / torch.pi + 1.0) * 4.0).long().clamp(max=7)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.05))]
    return nn.Sequential(nn.Linear(2, 64), nn.ReLU(), *hidden, nn.Linear(64, 8))


def main() -> None:
    torch.set_num_threads(1)
    with npp.pipeline.connect(timeout=60) as world:
        pipe = npp.pipeline.AsyncPipeline(
            model(), nn.functional.cross_entropy, batch, UPDATES, world, lr=1e-3, partition="parameters"
        )
        pipe.resume(FOLDER)
        while pipe.updates < UPDATES:
            loss = pipe.step()
            pipe.save(FOLDER, every=EVERY)
            if loss is not None and pipe.updates % EVERY == 0:
                print(f"update {pipe.updates}: loss {float(loss):.3f}, delays {pipe.delays}", flush=True)
        pipe.export(f"{FOLDER}/model.pt")  # loads into model()


if __name__ == "__main__":
    main()
