"""Measure steps with small state against float32 ones, in turn in one run: ``python -m benchmarks.small_state -h``."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
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


def step_of(workload: str, dtype: torch.dtype, options: dict[str, Any]) -> Callable[[], None]:
    """Return a step over a list of parameters that have gradients of their own."""
    made = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in WORKLOADS[workload]()]
    for p in made:
        p.grad = torch.randn_like(p)
    return npp.NAdam(made, betas=(0.99, 0.999), backend="cpu", **options).step


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_state", description=__doc__)
    parser.add_argument("--workload", choices=list(WORKLOADS), default="gpt2-small", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=12, help="measured steps of each row (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="number of intra-op threads (default: torch's)")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="default: all")
    options = parser.parse_args(arguments)
    with threads(options.threads):
        steps = {name: step_of(options.workload, *ROWS[name][1:]) for name in options.rows}
        seconds = measure(steps, options.rounds)
        print(machine())
    base = statistics.median(seconds[options.rows[0]])
    print(f"| step | bytes | median ms (quartiles) | of {options.rows[0]}'s time |\n|---|--:|--:|--:|")
    for name, samples in seconds.items():
        low, median, high = (1e3 * s for s in statistics.quantiles(samples, n=4))
        print(f"| {name} | {ROWS[name][0]} | {median:.1f} ({low:.1f} to {high:.1f}) | {median / 1e3 / base:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
