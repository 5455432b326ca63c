"""What the step is to reach, and what it does, in one table: ``python -m benchmarks.summary``.

Peers are measured in turn (A B C A B C ...). A ratio is the median of the ratios of the same round, since shared
machines change the speed of their memory within minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nesterov_pp as npp
from benchmarks import workloads as w
from benchmarks.step import commit, processor

Samples = dict[str, list[float]]


def measure(peers: dict[str, w.Step], rounds: int, warmup: int = 3) -> Samples:
    """Seconds of each peer in each round."""
    seconds: Samples = {name: [] for name in peers}
    for r in range(rounds + warmup):
        for name, step in peers.items():
            w.prepare(step)
            begin = time.perf_counter()
            step()
            elapsed = time.perf_counter() - begin
            if r >= warmup:
                seconds[name].append(elapsed)
    return seconds


def row(what: str, target: str, samples: Samples, value: Callable[[dict[str, float]], float]) -> dict[str, Any]:
    """One row: ``value`` of every round's times, its quartiles, and the median time of each peer."""
    rounds = [dict(zip(samples, times, strict=True)) for times in zip(*samples.values(), strict=True)]
    low, median, high = statistics.quantiles([value(times) for times in rounds], n=4)
    return {
        "what": what,
        "target": target,
        "quartiles": [round(x, 3) for x in (low, median, high)],
        "ms": {name: round(statistics.median(times) * 1e3, 3) for name, times in samples.items()},
    }


def full_precision(rounds: int) -> list[dict[str, Any]]:
    problem = w.Problem(w.gpt2_small())
    samples = measure(
        {
            "ours": w.ours(problem),
            "ring": w.ours_with_ring(problem, 8),
            "clipping": w.ours_clipping(problem),
            "read g": w.plain_read(problem),
            "plain loop": w.plain_loop(problem),
            "foreach": w.torch_nadam(problem),
            "compiled": w.torch_nadam_compiled(problem),
            "copies": w.torch_nadam_with_stash(problem),
            "AdamW fused": w.torch_adamw_fused(problem),
        },
        rounds,
    )

    def of(*names: str) -> Samples:
        return {name: samples[name] for name in names}

    return [
        row(
            "torch.optim.NAdam(foreach=True) / ours", ">= 6", of("ours", "foreach"), lambda t: t["foreach"] / t["ours"]
        ),
        row("the same under torch.compile / ours", ">= 2", of("ours", "compiled"), lambda t: t["compiled"] / t["ours"]),
        row(
            "torch.optim.AdamW(fused=True) / ours",
            ">= 1",
            of("ours", "AdamW fused"),
            lambda t: t["AdamW fused"] / t["ours"],
        ),
        row(
            "our bandwidth / that of a plain C++ loop with the same 7 streams",
            ">= 0.95",
            of("ours", "plain loop"),
            lambda t: t["plain loop"] / t["ours"],
        ),
        row("a ring of 8 / in place", "<= 1.05", of("ours", "ring"), lambda t: t["ring"] / t["ours"]),
        row(
            "foreach NAdam and a stash by three copies / our ring of 8",
            ">= 8",
            of("ring", "copies"),
            lambda t: t["copies"] / t["ring"],
        ),
        row(
            "what clipping adds / reading g once",
            "<= 1.1",
            of("ours", "clipping", "read g"),
            lambda t: (t["clipping"] - t["ours"]) / t["read g"],
        ),
    ]


def tiny_tensors(rounds: int) -> list[dict[str, Any]]:
    problem = w.Problem(w.tiny_tensors())
    samples = measure({"ours": w.ours(problem), "AdamW fused": w.torch_adamw_fused(problem)}, 10 * rounds)
    what = "1,000 tensors of 64: torch.optim.AdamW(fused=True) / ours"
    return [row(what, ">= 10", samples, lambda t: t["AdamW fused"] / t["ours"])]


def half_precision(rounds: int) -> list[dict[str, Any]]:
    full, half = w.Problem(w.gpt2_small()), w.Problem(w.gpt2_small(), torch.bfloat16)
    peers = {"float32": w.ours(full), "bfloat16": w.ours(half), "AdamW fused": w.torch_adamw_fused(half)}
    samples = measure(peers, rounds)
    bytes_of = full.bytes_per_parameter / half.bytes_per_parameter
    return [
        row(
            "bandwidth over 14 B/parameter of bfloat16 / over 28 B of float32",
            ">= 0.9",
            {name: samples[name] for name in ("float32", "bfloat16")},
            lambda t: t["float32"] / t["bfloat16"] / bytes_of,
        ),
        row(
            "bfloat16: torch.optim.AdamW(fused=True) / ours",
            "",
            {name: samples[name] for name in ("bfloat16", "AdamW fused")},
            lambda t: t["AdamW fused"] / t["bfloat16"],
        ),
    ]


def table(found: dict[str, Any]) -> str:
    lines = [found["conditions"], "", "| ratio | aim | measured (quartiles) | median ms |", "|---|---|---|---|"]
    for r in found["rows"]:
        low, median, high = r["quartiles"]
        times = ", ".join(f"{name} {ms:.4g}" for name, ms in r["ms"].items())
        lines.append(f"| {r['what']} | {r['target']} | {median:.2f} ({low:.2f} to {high:.2f}) | {times} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="measured rounds (default: 20)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    rows = full_precision(options.rounds) + tiny_tensors(options.rounds) + half_precision(options.rounds)
    module, reason = npp.kernels.extension.load()
    found = {
        "conditions": (
            f"gpt2-small unless said otherwise: 148 tensors, 124.4M parameters, float32; {options.rounds} rounds, "
            f"{torch.get_num_threads()} threads, {processor()} ({module.isa() if module else reason}), "
            f"torch {torch.__version__}"
        ),
        "python": platform.python_version(),
        "commit": commit(),
        "rows": rows,
    }
    print(table(found))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
