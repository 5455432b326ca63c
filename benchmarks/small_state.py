"""Measure steps with small state against float32 ones, in turn in one run: ``python -m benchmarks.small_state -h``.

With ``--peers``, AdamW with moments in eight bits against the same of other packages, where these are installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nesterov_pp as npp
from benchmarks.step import machine, measure
from benchmarks.workloads import WORKLOADS, threads

BFLOAT16 = torch.bfloat16
ROWS: dict[str, tuple[float, torch.dtype, dict[str, Any]]] = {
    "float32": (28, torch.float32, {}),
    "float32, bfloat16 moments": (20, torch.float32, {"state_dtype": BFLOAT16}),
    "float32, 8-bit moments": (16.25, torch.float32, {"state_dtype": "8bit"}),
    "bfloat16": (14, BFLOAT16, {}),
    "bfloat16, float32 masters": (28, BFLOAT16, {"master_weights": True}),
    "bfloat16, 24-bit masters": (24, BFLOAT16, {"master_weights": "24bit"}),
    "bfloat16, 24-bit masters, 8-bit moments": (12.25, BFLOAT16, {"master_weights": "24bit", "state_dtype": "8bit"}),
}
"""The bytes that a step of NAdam reads and writes for a parameter, the dtype of the weights, and the options."""


def parameters(workload: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Return a list of parameters that have gradients of their own."""
    made = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in WORKLOADS[workload]()]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def step_of(workload: str, dtype: torch.dtype, options: dict[str, Any]) -> Callable[[], None]:
    """Return a step of NAdam."""
    return npp.NAdam(parameters(workload, dtype), betas=(0.99, 0.999), backend="cpu", **options).step


OURS = "nesterov_pp.AdamW(state_dtype='8bit')"
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bitsandbytes.optim.AdamW8bit": ("bitsandbytes.optim", {}),
    "torchao.optim.AdamW8bit": ("torchao.optim", {}),  # compiles its step
    "torch.optim.AdamW(fused=True), float32 moments": ("torch.optim", {"fused": True}),
}
"""The modules whose AdamW a step is compared with, and its options."""


def peer_steps(workload: str) -> dict[str, Callable[[], None]]:
    """Return the steps of AdamW over float32 weights; say of each package that is left out why."""
    hyper: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.01}
    steps: dict[str, Callable[[], None]] = {
        OURS: npp.AdamW(parameters(workload), state_dtype="8bit", backend="cpu", **hyper).step
    }
    for name, (module, options) in PEERS.items():
        try:
            found = importlib.import_module(module)
            kind = getattr(found, "AdamW8bit", None) or found.AdamW
            optimizer = kind(parameters(workload), **hyper, **options)
            optimizer.step()
        except (ImportError, RuntimeError, NotImplementedError) as error:
            print(f"{name} is left out: {str(error).splitlines()[0]}")
            continue
        steps[name] = optimizer.step
    return steps


def table(seconds: dict[str, list[float]], columns: dict[str, float], base: str) -> dict[str, dict[str, float]]:
    """Print medians and quartiles in milliseconds, and return them."""
    print(f"| step | bytes | median ms (quartiles) | of {base}'s time |\n|---|--:|--:|--:|")
    found = {}
    for name, samples in seconds.items():
        low, median, high = (1e3 * s for s in statistics.quantiles(samples, n=4))
        found[name] = {"low": low, "median": median, "high": high}
        of_base = median / 1e3 / statistics.median(seconds[base])
        print(f"| {name} | {columns.get(name, '')} | {median:.1f} ({low:.1f} to {high:.1f}) | {of_base:.2f} |")
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_state", description=__doc__)
    parser.add_argument("--workload", choices=list(WORKLOADS), default="gpt2-small", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=12, help="measured steps of each row (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="number of intra-op threads (default: torch's)")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="default: all")
    parser.add_argument("--peers", action="store_true", help="compare AdamW with other packages instead")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    with threads(options.threads):
        if options.peers:
            steps, base = peer_steps(options.workload), OURS
        else:
            steps, base = {name: step_of(options.workload, *ROWS[name][1:]) for name in options.rows}, options.rows[0]
        seconds, where = measure(steps, options.rounds), machine()
    print(where)
    found = table(seconds, {name: row[0] for name, row in ROWS.items()}, base)
    if options.json:
        content = {"machine": where, "workload": options.workload, "rounds": options.rounds, "milliseconds": found}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
