"""One process of a pipeline on a host of its own: ``network_worker.py FOLDER MICROBATCHES TIMEOUT SLACK SECONDS``.

Every forward takes at least so many seconds. The losses go to a file of the folder, in which a line for each microbatch
says how far the process is; an error is printed, with the seconds that the last step took.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from toy import microbatch, model

from nesterov_pp.pipeline import AsyncPipeline, connect


def main() -> None:
    folder, (total, slack), (timeout, seconds) = Path(sys.argv[1]), map(int, sys.argv[2:4]), map(float, sys.argv[4:6])
    torch.set_num_threads(1)
    begin = time.monotonic()
    try:
        with connect(timeout) as world, (folder / f"{world.rank}.txt").open("w") as done:
            modules = model(world.size, dtype=torch.float32)
            pipe = AsyncPipeline(modules, F.cross_entropy, microbatch, total, world, lr=3e-3, slack=slack)
            pipe.module.register_forward_pre_hook(lambda *_: time.sleep(seconds))
            for _ in range(total):
                begin = time.monotonic()
                loss = pipe.step()
                done.write(f"{loss if loss is None else float(loss)}\n")
                done.flush()
    except Exception as error:
        print(f"{type(error).__name__}: {error} [{time.monotonic() - begin:.1f} s]", flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
