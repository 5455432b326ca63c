"""One process of a pipeline that saves, is killed, and resumes.

Usage: saving_worker.py FOLDER SCENARIO dies|ends with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from toy import model

from nesterov_pp.pipeline import AsyncPipeline, Batches, VirtualPipeline, World, connect

SCENARIOS: dict[str, dict[str, Any]] = {
    "nesterov": {"method": "nesterov"},
    "no-stash": {"method": "nesterov-no-stash", "correction_updates": 9},
    "no-stash-every": {"method": "nesterov-no-stash", "correction_updates": 9},
    "xpipe-two-per-update": {"method": "xpipe", "microbatches_per_update": 2},
    "differences": {"old_versions": "8bit-differences"},
    "rounded": {"old_versions": "bfloat16"},
}
EVERY = dict.fromkeys(SCENARIOS, 6) | {"no-stash-every": 1}
DIES_AT, ENDS_AT = 18, 22


def loader() -> DataLoader[Any]:
    """Return a shuffled loader with five microbatches an epoch."""
    x = torch.arange(40) % 5
    return DataLoader(TensorDataset(x, (3 * x + 1) % 5), batch_size=8, shuffle=True)


def length(name: str) -> int:
    return ENDS_AT * int(SCENARIOS[name].get("microbatches_per_update", 1))


def stages(name: str) -> int:
    """Return the number of stages, enough for a ring in which older versions are not kept in full."""
    return 3 if "old_versions" in SCENARIOS[name] else 2


def virtual(name: str) -> VirtualPipeline:
    """Return the virtual pipeline of a scenario."""
    return VirtualPipeline(model(stages(name), 0.1, torch.float32), F.cross_entropy, lr=1e-2, seed=3, **SCENARIOS[name])


def losses_of(pipe: VirtualPipeline, updates: int) -> list[float]:
    """Train up to a number of updates, and return the losses."""
    batches, losses = Batches(loader(), seed=3), []
    while pipe.updates < updates:
        losses.append(float(pipe.step(*batches(pipe.microbatches))))
    return losses


def build(world: World, name: str, total: int) -> AsyncPipeline:
    modules = model(stages(name), 0.1, torch.float32)
    return AsyncPipeline(modules, F.cross_entropy, loader(), total, world, lr=1e-2, seed=3, **SCENARIOS[name])


def die_while_writing() -> None:
    """Make the system kill this process before the next complete file takes its name."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = die  # type: ignore[assignment]


def main() -> None:
    folder, name, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    with connect(timeout=60) as world:
        pipe = build(world, name, length(name))
        resumed = pipe.resume(folder / "run")
        assert (resumed is None) == (how == "dies")
        found: dict[str, Any] = {"resumed at": pipe.updates, "microbatches before": pipe.microbatches, "losses": []}
        while pipe.updates < ENDS_AT:
            loss = pipe.step()
            found["losses"] += [] if loss is None else [float(loss)]
            dying = how == "dies" and world.rank == 0 and pipe.updates == DIES_AT
            if dying:
                die_while_writing()
            pipe.save(folder / "run", every=EVERY[name])
        longer = build(world, name, 2 * length(name))
        try:
            longer.resume(folder / "run")
            found["other total"] = ""
        except ValueError as error:
            found["other total"] = str(error)
        if pipe.is_last:
            torch.save(found, folder / "results.pt")


if __name__ == "__main__":
    main()
