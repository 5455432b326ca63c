"""Print the targets of the step and its measurements in one table of ratios: ``python -m benchmarks.summary``.

Steps that are compared are measured in turn (A B C A B C ...). A ratio is the median of the ratios of the single
rounds: the memory speed of a shared machine changes within minutes, but one round sees one speed. This does not help
against other load on the same cores, which slows steps of many parallel regions far more than steps of one; therefore
the load before the run is part of the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import workloads as w
from benchmarks.plain import NoCompilerError
from benchmarks.step import machine, measure

Times = dict[str, float]  # seconds of each peer in one round
Samples = dict[str, list[float]]
Peer = Callable[[w.Problem], w.Step]

OURS, RING, CLIPPING = "ours", "ring of 8", "clipping"
FOREACH, COMPILED, COPIES, TORCH_CLIP = "foreach", "compiled", "copies", "clip + foreach"
FUSED, LOOP, READ, HALF = "AdamW fused", "plain loop", "read g", "bfloat16"


@dataclass(frozen=True)
class Row:
    """A row of the table: a ratio of the times of one round."""

    what: str
    target: str
    peers: tuple[str, ...]
    ratio: Callable[[Times], float]


def over(what: str, target: str, above: str, below: str) -> Row:
    """Return the row for the time of ``above`` over the time of ``below``."""
    return Row(what, target, (above, below), lambda t: t[above] / t[below])


@dataclass(frozen=True)
class Group:
    """Peers that are measured in turn, few enough to fit into 16 GB together, and the rows made from them."""

    shapes: Callable[[], w.Shapes]
    peers: dict[str, Peer]
    rows: tuple[Row, ...]
    repeat: int = 1  # multiplies the rounds, for short steps
    half: dict[str, Peer] | None = None  # peers on the same list in bfloat16


GROUPS = (
    Group(
        w.gpt2_small,
        {
            OURS: w.ours,
            LOOP: w.plain_loop,
            FUSED: w.torch_adamw_fused,
            COMPILED: w.torch_nadam_compiled,
            FOREACH: w.torch_nadam,
        },
        (
            over("torch.optim.NAdam(foreach=True) / ours", ">= 6", FOREACH, OURS),
            over("the same under torch.compile / ours", ">= 2", COMPILED, OURS),
            over("torch.optim.AdamW(fused=True) / ours", ">= 1", FUSED, OURS),
            over("bandwidth: ours / a plain C++ loop with the same 7 streams", ">= 0.95", LOOP, OURS),
        ),
    ),
    Group(
        w.gpt2_small,
        {
            OURS: w.ours,
            RING: lambda problem: w.ours_with_ring(problem, 8),
            COPIES: lambda problem: w.torch_nadam_with_stash(problem, 8),
        },
        (
            over("ours with a ring of 8 / ours without", "<= 1.05", RING, OURS),
            over("foreach NAdam and its stash by three copies / ours with a ring of 8", ">= 8", COPIES, RING),
        ),
    ),
    Group(
        w.gpt2_small,
        {OURS: w.ours, CLIPPING: w.ours_clipping, READ: w.plain_read, TORCH_CLIP: w.torch_clip_and_nadam},
        (
            Row(
                "what clipping adds to ours / a plain C++ read of g",
                "<= 1.1",
                (CLIPPING, OURS, READ),
                lambda t: (t[CLIPPING] - t[OURS]) / t[READ],
            ),
            over("clip_grad_norm_ and foreach NAdam / ours clipping", "", TORCH_CLIP, CLIPPING),
        ),
    ),
    Group(
        w.gpt2_small,
        {OURS: w.ours},
        (
            Row(
                "bandwidth: ours in bfloat16 (14 B/parameter) / ours in float32 (28 B)",
                ">= 0.9",
                (OURS, HALF),
                lambda t: 14 / t[HALF] / (28 / t[OURS]),
            ),
            over("in bfloat16: torch.optim.AdamW(fused=True) / ours", "", FUSED, HALF),
        ),
        half={HALF: w.ours, FUSED: w.torch_adamw_fused},
    ),
    Group(
        w.tiny_tensors,
        {OURS: w.ours, FUSED: w.torch_adamw_fused},
        (over("1,000 tensors of 64: torch.optim.AdamW(fused=True) / ours", ">= 10", FUSED, OURS),),
        repeat=10,
    ),
)


def prepared(group: Group, missing: set[str]) -> dict[str, w.Step]:
    """Return the steps of a group; add the reason why a peer cannot be measured to ``missing``."""
    steps: dict[str, w.Step] = {}
    for dtype, peers in ((torch.float32, group.peers), (torch.bfloat16, group.half)):
        if peers is None:
            continue
        problem = w.Problem(group.shapes(), dtype)
        for name, peer in peers.items():
            try:
                steps[name] = peer(problem)
            except NoCompilerError as reason:
                missing.add(str(reason))
    return steps


def measured(row: Row, samples: Samples) -> dict[str, Any]:
    """Return the quartiles of the row's ratio over the rounds, the ratio of the medians, and the median times."""
    rounds = [dict(zip(row.peers, times, strict=True)) for times in zip(*(samples[p] for p in row.peers), strict=True)]
    medians = {peer: statistics.median(samples[peer]) for peer in row.peers}
    return {
        "what": row.what,
        "target": row.target,
        "quartiles": [round(q, 4) for q in statistics.quantiles(map(row.ratio, rounds), n=4)],
        "of_medians": round(row.ratio(medians), 4),
        "ms": {peer: round(seconds * 1e3, 4) for peer, seconds in medians.items()},
    }


def run(groups: tuple[Group, ...], rounds: int) -> dict[str, Any]:
    """Measure the groups one after the other; leave out rows whose peers are not all there."""
    load = os.getloadavg()[0]  # before the first measurement, so it is the load of others
    rows, all_samples, missing = [], [], set[str]()
    for group in groups:
        steps = prepared(group, missing)
        samples = measure(steps, rounds * group.repeat)
        rows += [measured(row, samples) for row in group.rows if steps.keys() >= set(row.peers)]
        all_samples.append({name: [round(s * 1e3, 4) for s in times] for name, times in samples.items()})
        del steps
        torch.compiler.reset()  # compiled steps keep their tensors alive
        gc.collect()
    found = machine()
    return {
        "conditions": (
            f"gpt2-small unless said otherwise: 148 tensors, 124.4M parameters, float32; {rounds} rounds, "
            f"{found['threads']} threads, {found['processor']} ({found['isa']}), torch {found['torch']}, "
            f"load of the machine before: {load:.1f}"
        ),
        **found,
        "rows": rows,
        "missing": sorted(missing),
        "samples_ms": all_samples,
    }


def table(found: dict[str, Any]) -> str:
    lines = [found["conditions"], "", "| ratio | aim | measured (quartiles) | median ms |", "|---|---|---|---|"]
    for row in found["rows"]:
        low, median, high = row["quartiles"]
        times = ", ".join(f"{name} {ms:.4g}" for name, ms in row["ms"].items())
        lines.append(f"| {row['what']} | {row['target']} | {median:.2f} ({low:.2f} to {high:.2f}) | {times} |")
    lines += [f"\nNot measured: {reason}" for reason in found.get("missing", [])]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="measured steps of each peer (default: 20)")
    parser.add_argument("--threads", type=int, help="number of intra-op threads (default: torch's)")
    parser.add_argument("--json", type=Path, help="also write the rows and every sample to this file (default: none)")
    options = parser.parse_args(arguments)
    with w.threads(options.threads):
        found = run(GROUPS, options.rounds)
    print(table(found))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
