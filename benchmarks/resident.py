"""Compare the bytes that a stage reports with those of its process: ``python -m benchmarks.resident -h``.

Every row is a process of its own, which trains one stage like a pipeline's, with microbatches in flight on the versions
of its ring. Reported are ``memory()`` and the gradients; resident is how far the process has grown before a step.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nesterov_pp as npp
from benchmarks.step import machine
from nesterov_pp.pipeline.stage_state import StageState

SMALL = {"master_weights": "24bit", "state_dtype": "8bit"}
ROWS: dict[str, tuple[torch.dtype, str, dict[str, Any]]] = {
    "float32": (torch.float32, "full", {}),
    "float32, differences": (torch.float32, "8bit-differences", {}),
    "float32, differences, 8-bit moments": (torch.float32, "8bit-differences", {"state_dtype": "8bit"}),
    "bfloat16": (torch.bfloat16, "full", {}),
    "bfloat16, differences": (torch.bfloat16, "8bit-differences", {}),
    "bfloat16, 24-bit masters, 8-bit moments": (torch.bfloat16, "full", SMALL),
    "bfloat16, 24-bit masters, 8-bit moments, differences": (torch.bfloat16, "8bit-differences", SMALL),
}
"""The dtype of the weights, how old versions are kept, and the options of NAdam."""


def resident(what: str = "VmRSS") -> int:
    """Return the resident bytes of this process; ``VmHWM`` for the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {what}")


def block(width: int) -> nn.Module:
    """Return the matrices of a transformer's block, one after the other."""
    shapes = [(width, 3 * width), (3 * width, width), (width, 4 * width), (4 * width, width)]
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b)) for a, b in shapes))


def run(row: str, width: int, blocks: int, delay: int, updates: int) -> dict[str, float]:
    """Train a stage; return its parameters and its bytes for each of them."""
    dtype, form, options = ROWS[row]
    warm = block(width).to(dtype)  # for what the libraries allocate at first use
    warm(torch.ones(2, width, dtype=dtype)).sum().backward()
    npp.NAdam(warm.parameters(), **options).step()
    del warm
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free now would be counted as if it were in use
    base = resident()
    module = nn.Sequential(*(block(width) for _ in range(blocks))).to(dtype)
    stash = npp.WeightStash(module, delay + 1, old_versions=form)  # type: ignore[arg-type]
    optimizer = npp.NAdam(module.parameters(), lr=1e-4, stash=stash, **options)
    count, in_flight, grown = sum(p.numel() for p in module.parameters()), deque[tuple[int, torch.Tensor]](), 0
    for m in range(updates + delay):
        with stash.use(stash.newest):
            in_flight.append((stash.newest, module(torch.randn(2, width, dtype=dtype)).float().square().mean()))
        if m < delay:
            continue
        version, loss = in_flight.popleft()
        with stash.bind(version):
            torch.autograd.backward(loss)
        grown = max(grown, resident() - base)
        optimizer.step(version=version)
    most = resident("VmHWM") - base
    reported = sum(StageState(stash, optimizer, module).memory().values()) + count * dtype.itemsize
    return {"parameters": count, "reported": reported / count, "resident": grown / count, "most": most / count}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resident", description=__doc__)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="default: all")
    parser.add_argument("--width", type=int, default=1024, help="width of the stage (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of the stage (default: %(default)s)")
    parser.add_argument("--delay", type=int, default=7, help="updates (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=10, help="steps of each row (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--alone", choices=list(ROWS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    shape = (options.width, options.blocks, options.delay, options.updates)
    if options.alone:
        print(json.dumps(run(options.alone, *shape)))
        return 0
    found = {}
    print("| stage | reported | resident | apart | most |\n|---|--:|--:|--:|--:|")
    for row in options.rows:
        names = ("--width", "--blocks", "--delay", "--updates")
        sizes = [word for name, value in zip(names, shape, strict=True) for word in (name, str(value))]
        command = [sys.executable, "-m", "benchmarks.resident", "--alone", row, *sizes]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[row] = one = json.loads(done.stdout.splitlines()[-1])
        apart = 100 * (one["resident"] / one["reported"] - 1)
        print(f"| {row} | {one['reported']:.1f} | {one['resident']:.1f} | {apart:+.1f} % | {one['most']:.1f} |")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "delay": options.delay, "rows": found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
