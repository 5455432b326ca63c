"""Train delayed pipelines on other kinds of tasks: ``python -m benchmarks.tasks images|continuation|language``.

``images``: a small residual network on pictures. ``continuation``: an encoder-decoder that continues a text.
``language``: the decoder-only model of ``train``. Each model is cut into eight stages and, with ``--precision
float32,bfloat16``, also trained in bfloat16 autocast. Every method has the same learning rates, those of its kind of
rule or of ``--rates``: the first seed tries all of them, the other seeds run the best. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks import images, texts
from benchmarks.task import Task
from nesterov_pp.kernels import Normaliser
from nesterov_pp.pipeline import VirtualPipeline, find_recipe

RATES = {True: (3e-4, 1e-3, 3e-3), False: (0.03, 0.1, 0.3)}
"""The learning rates, by whether the rule has a second moment."""

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """A method at its best learning rate.

    Attributes:
        found: the numbers of the task's judge, as means over seeds.
        each: the first of these numbers for each seed.
        by_lr: the first of these numbers for the first seed at each rate.
        seconds: the average duration of a run.
    """

    method: str
    precision: str
    lr: float
    found: dict[str, float]
    each: list[float]
    by_lr: dict[str, float]
    seconds: float


def train(task: Task, method: str, lr: float, seed: int, microbatches: int, precision: str) -> VirtualPipeline:
    """Train and return a pipeline, with linear warm-up over a tenth of the run and a cosine to a tenth of ``lr``."""
    torch.manual_seed(seed)
    late: dict[str, Any] = {}
    if find_recipe(method).correction_updates is not None:
        late["correction_updates"] = max(1, microbatches // 7)
    pipe = VirtualPipeline(
        task.stages(), task.loss_fn, method, lr, max_grad_norm=10.0, autocast=PRECISIONS[precision], **late
    )
    order = torch.Generator().manual_seed(seed)
    for m in range(microbatches):
        warm = min(1.0, (m + 1) / (0.1 * microbatches))
        pipe.lr = lr * warm * (0.1 + 0.45 * (1.0 + math.cos(math.pi * m / microbatches)))
        pipe.step(*task.microbatch(order))
    return pipe


def compare(task: Task, method: str, precision: str, seeds: int, microbatches: int, rates: Sequence[float] = ()) -> Row:
    """Run one method: every rate with the first seed, the best rate with the others."""
    begin = time.perf_counter()
    adaptive = getattr(find_recipe(method).rule, "_normaliser", Normaliser.RMS) == Normaliser.RMS
    rates = rates or RATES[adaptive]

    def run(lr: float, seed: int) -> dict[str, float]:
        return task.judge(train(task, method, lr, seed, microbatches, precision))

    tried = {lr: run(lr, 0) for lr in rates}
    loss = next(iter(tried[rates[0]]))
    best = min(tried, key=lambda lr: tried[lr][loss] if math.isfinite(tried[lr][loss]) else math.inf)
    found = [tried[best], *(run(best, seed) for seed in range(1, seeds))]
    return Row(
        method=method,
        precision=precision,
        lr=best,
        found={name: fmean(one[name] for one in found) for name in found[0]},
        each=[one[loss] for one in found],
        by_lr={f"{lr:g}": one[loss] for lr, one in tried.items()},
        seconds=(time.perf_counter() - begin) / (len(tried) + seeds - 1),
    )


def heading(found: Sequence[str]) -> str:
    """Return the heading of the table."""
    names = ["method", "precision", "lr", *found, "loss of each seed", "first seed at each rate"]
    return "| " + " | ".join(names) + " |\n|---|---|--:|" + "--:|" * len(found) + "---|---|"


def line(row: Row) -> str:
    """Return a line of the table."""
    by_lr = ", ".join(f"{loss:.3f} ({lr})" for lr, loss in row.by_lr.items())
    found = [f"{value:.3f}" if name != "accuracy" else f"{100 * value:.1f} %" for name, value in row.found.items()]
    each = " ".join(f"{loss:.3f}" for loss in row.each)
    cells = [row.method, row.precision, f"{row.lr:g}", *found, each, by_lr]
    return "| " + " | ".join(cells) + " |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("images", "continuation", "language"), help="the task to train")
    parser.add_argument(
        "--data",
        type=Path,
        help="images: folder with train.zip and test.zip (default: scikit-learn's digits); texts: as for `train`",
    )
    parser.add_argument("--methods", help="methods to compare, separated by commas (default: the methods of the task)")
    parser.add_argument(
        "--precision", default="float32", help="float32, bfloat16, or both separated by a comma (default: %(default)s)"
    )
    parser.add_argument(
        "--rates", help="learning rates to try, separated by commas (default: three for each kind of rule)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default: %(default)s)")
    parser.add_argument("--microbatches", type=int, default=2000, help="microbatches per run (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="examples in a microbatch (default: 32 pictures, 8 texts)")
    parser.add_argument("--threads", type=int, default=1, help="number of intra-op threads (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the table to this file (default: none)")
    return parser


def _task(given: argparse.Namespace) -> Task:
    """Return the task; raise ValueError if the data cannot be used."""
    if given.task == "images":
        return images.task(given.data, given.batch or 32)
    build = {"continuation": texts.continuation, "language": texts.language}[given.task]
    return build(None if given.data is None else str(given.data), given.batch or 8)


def _rates(given: str | None) -> list[float]:
    """Return the learning rates of a list like "1e-3,3e-3"; raise ValueError if it is not one of positive numbers."""
    refusal = ValueError(f"--rates takes learning rates above 0, like 1e-3,3e-3, not {given}")
    try:
        rates = [float(rate) for rate in given.split(",")] if given else []
    except ValueError:
        raise refusal from None
    if not all(0 < rate < math.inf for rate in rates):
        raise refusal
    return rates


def main(argv: list[str] | None = None) -> int:
    given = _parser().parse_args(argv)
    torch.set_num_threads(given.threads)
    precisions = given.precision.split(",")
    try:
        if not set(precisions) <= set(PRECISIONS):
            raise ValueError(f"--precision takes {' and '.join(PRECISIONS)}, not {given.precision}")
        rates = _rates(given.rates)
        task = _task(given)
        methods = given.methods.split(",") if given.methods else task.methods
        for method in methods:
            for precision in precisions:
                find_recipe(method).check_forward(recompute=False, autocast=PRECISIONS[precision] is not None)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    count = sum(p.numel() for m in task.stages() for p in m.parameters())
    what = f"{task.what}; 8 stages, {count:,} parameters, {given.microbatches} microbatches, {given.seeds} seed(s)"
    print(f"{what}, torch {torch.__version__}\n", flush=True)
    rows: list[Row] = []
    for method in methods:
        for precision in precisions:
            rows.append(compare(task, method, precision, given.seeds, given.microbatches, rates))
            if len(rows) == 1:
                print(heading(list(rows[0].found)))
            print(line(rows[-1]), flush=True)
    if given.json:
        result = {"what": what, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
