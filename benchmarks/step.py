"""Print a table of every peer's step on one list, interleaved in one run: ``python -m benchmarks.step --help``."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import nesterov_pp as npp
from benchmarks.workloads import PEERS, WORKLOADS, Problem, Step, prepare, threads

BASE = "torch.optim.NAdam(foreach=True)"
UNMEASURED = 3


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every step, taken in turn (A B C A B C ...) after unmeasured rounds, for compilation."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for r in range(rounds + UNMEASURED):
        for name, step in steps.items():
            prepare(step)
            start = time.perf_counter()
            step()
            elapsed = time.perf_counter() - start
            if r >= UNMEASURED:
                seconds[name].append(elapsed)
    return seconds


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """Return the processor and software that a result was measured with."""
    module, reason = npp.kernels.extension.load()
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "isa": module.isa() if module is not None else f"none: {reason}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def result(problem: Problem, workload: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    rows = {}
    base = statistics.median(seconds[BASE])
    for name, samples in seconds.items():
        low, median, high = statistics.quantiles(samples, n=4)
        rows[name] = {
            "samples_ms": [round(s * 1e3, 4) for s in samples],
            "quartiles_ms": [round(s * 1e3, 4) for s in (low, median, high)],
            "gb_per_s": round(problem.bytes_per_parameter * problem.elements / median / 1e9, 2),
            "times_faster": round(base / median, 3),
        }
    return {
        "workload": workload,
        "tensors": len(problem.weights),
        "parameters": problem.elements,
        "dtype": str(problem.weights[0].dtype).removeprefix("torch."),
        "bytes_per_parameter": problem.bytes_per_parameter,
        **machine(),
        "rows": rows,
    }


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['workload']}: {found['tensors']} tensors, {found['parameters'] / 1e6:.1f}M parameters, "
        f"{found['dtype']}, {found['threads']} threads, {found['processor']} ({found['isa']}), torch {found['torch']}",
        "",
        f"| step | median ms (quartiles) | GB/s of {found['bytes_per_parameter']} B/parameter | against {BASE} |",
        "|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        low, median, high = row["quartiles_ms"]
        lines.append(
            f"| {name} | {median:.2f} ({low:.2f} to {high:.2f}) | {row['gb_per_s']:.1f} | {row['times_faster']:.2f}x |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument(
        "--workload", choices=list(WORKLOADS), default="gpt2-small", help="list of tensors (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="dtype of all tensors (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=20, help="measured steps of each peer (default: 20)")
    parser.add_argument("--threads", type=int, help="number of intra-op threads (default: torch's)")
    parser.add_argument("--json", type=Path, help="also write every sample to this file (default: none)")
    options = parser.parse_args(arguments)
    problem = Problem(WORKLOADS[options.workload](), getattr(torch, options.dtype))
    with threads(options.threads):
        steps = {name: peer(problem) for name, peer in PEERS.items()}
        found = result(problem, options.workload, measure(steps, options.rounds))
    print(table(found))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
