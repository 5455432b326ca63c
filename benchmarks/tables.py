"""Write the measured tables of the README and of docs/ from the committed results: ``python -m benchmarks.tables``.

``--demo runs/demo``, ``--small runs/small`` and the other flags first copy the results of a finished comparison: of the
demo, of ``make compare-small``, or of one that docs/methods.md has the command of. If the folder holds several
comparisons, as those of a method that has rates of its own, their rows go into one table.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import roofline, tasks
from benchmarks.step import commit, processor
from benchmarks.step import table as step_table
from benchmarks.summary import table as summary_table
from nesterov_pp.training.results import depth_markdown, family_of, markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SUMMARY = "cpu-summary.json"
GPU = "gpu-roofline.json"
BILLION = "1b"
TAKEN = {
    "demo": ("cpu-demo.json", "demo.png"),
    "small": ("compare-small.json", "compare-small.png"),
    "long": ("compare-long.json", "compare-long.png"),
    "depth": ("compare-depth.json", "compare-depth.png"),
    "rotated": ("compare-rotated.json", "compare-rotated.png"),
    "waiting": ("compare-waiting.json", "compare-waiting.png"),
    "lasting": ("compare-lasting.json", "compare-lasting.png"),
    "depth-rotated": ("compare-depth-rotated.json", "compare-depth-rotated.png"),
    "rates": ("compare-rates.json", "compare-rates.png"),
    "same-rate": ("compare-same-rate.json", None),
    "batches": ("compare-batches.json", None),
    "updates": ("compare-updates.json", None),
    "wide": ("compare-wide.json", "compare-wide.png"),
}
"""The files of each finished comparison, in the results and in docs/, by the flag that names its folder."""

TASKS = ("images", "continuation", "language", "images-rotated", "continuation-rotated")
"""The tables of ``benchmarks.tasks``, in the results."""


def record(folder: Path, results: str, plot: str | None, ran: str) -> None:
    """Keep the table of the comparisons in a folder, and a plot, with the machine and the commit that ``ran`` them."""
    parts, configs, rows = [], [], []
    for path in sorted(folder.rglob("compare.json")):
        parts.append(json.loads(path.read_text()))
        runs = [json.loads(run.read_text())["config"] for run in sorted(path.parent.rglob("config.json"))]
        rows += [
            {**row, "batch": runs[0]["batch"], "microbatches": runs[0]["microbatches"]} for row in parts[-1]["methods"]
        ]
        configs += runs
    found = {
        "methods": rows,
        "comparison": " ".join(part["comparison"] for part in parts).strip(),
        "failed": [reason for part in parts for reason in part["failed"]],
        "conditions": conditions(configs),
        "commit": ran,
    }
    (RESULTS / results).write_text(json.dumps(found, indent=1) + "\n")
    if plot is not None:
        drawn = "compare-rates.png" if plot == "compare-rates.png" else "compare.png"
        shutil.copyfile(folder / drawn, ROOT / "docs" / plot)


def conditions(configs: Sequence[Mapping[str, Any]]) -> str:
    """Return what the runs have in common, as a line above their table."""

    def same(name: str) -> Any:
        """Return the value of a setting if all runs agree in it, else None."""
        values = {config[name] for config in configs}
        return values.pop() if len(values) == 1 else None

    parts = [
        same("stages") and f"{same('stages')} stages",
        f"{same('layers')} layers of width {same('width')}",
        same("microbatches") and f"{same('microbatches'):,} microbatches of {same('batch')} x {same('context')} bytes",
        same("lr") and f"lr {same('lr'):g}",
        same("warmup") is not None and f"warm-up {same('warmup')}",
        same("embedding_lr") != 1.0 and f"embeddings at {same('embedding_lr'):g} times the rate",
        processor(),
        "one thread a run",
        f"torch {torch.__version__}:",
    ]
    return ", ".join(part for part in parts if part)


def demo_table(found: dict[str, Any]) -> str:
    return f"{found['conditions']}\n\n{markdown(found['methods'], found['comparison'], brief=True)}".rstrip()


def ranking(found: dict[str, Any]) -> str:
    """Return the table of a comparison of many methods, the best first."""
    lines = [
        found["conditions"],
        "",
        "| method | rule | lr | validation loss | each seed | first seed at other rates | slowdown | recovered |",
        "|---|---|--:|--:|---|---|--:|--:|",
    ]
    for row in sorted(found["methods"], key=lambda row: row["validation_loss"]):
        others = ", ".join(f"{loss:.3f}" for lr, loss in row["by_lr"].items() if lr != str(row["lr"]))
        each = " ".join(f"{loss:.3f}" for loss in row["validation_losses"])
        rule = family_of(row["method"])
        cells = [row["method"], rule, f"{row['lr']:g}", f"{row['validation_loss']:.3f}", each, others]
        # Results from before the rules were told apart compare all methods with those of AdamW.
        within = row.get("rule", "adam") == rule and row["slowdown"] is not None
        cells.append(f"{row['slowdown']:.2f}x" if within else "-")
        cells.append(f"{100 * row['recovered']:.0f} %" if within and row["recovered"] is not None else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def depth_table(found: dict[str, Any]) -> str:
    """Return the table of final losses by the number of stages."""
    by_depth: dict[int, list[dict[str, Any]]] = {}
    for row in found["methods"]:
        by_depth.setdefault(row["stages"], []).append(row)
    return f"{found['conditions']}\n\n{depth_markdown(by_depth)}".rstrip()


def rates_table(found: dict[str, Any]) -> str:
    """Return the table of the loss of each method at each learning rate, each method's lowest in bold.

    It is that of the first seed, or the mean over seeds if all of them have run at all rates.
    """
    rows = found["methods"]
    rates = sorted({float(lr) for row in rows for lr in row["by_lr"]})
    every = all(len(losses) == len(row["validation_losses"]) for row in rows for losses in row["losses_by_lr"].values())
    headings = ["mean at" if every else "first seed at", *(f"{rate:g}" for rate in rates), "each seed at the best"]
    lines = [found["conditions"], "", f"| {' | '.join(headings)} |", "|---" + "|--:" * len(rates) + "|---|"]
    for row in rows:
        cells = {float(lr): f"{loss:.3f}" for lr, loss in row["by_lr"].items()}
        cells[row["lr"]] = f"**{cells[row['lr']]}**"
        each = " ".join(f"{loss:.3f}" for loss in row["validation_losses"])
        lines.append(f"| {' | '.join([row['method'], *(cells.get(rate, '-') for rate in rates), each])} |")
    return "\n".join(lines)


def batches_table(found: dict[str, Any]) -> str:
    """Return the table of each method's loss, best rate and spread over seeds at each size of the microbatches."""
    sizes = sorted({(row["batch"], row["microbatches"]) for row in found["methods"]})
    rows = {(row["method"], row["batch"]): row for row in found["methods"]}
    headings = ["sequences a microbatch, microbatches", *(f"{batch}, {count:,}" for batch, count in sizes)]
    lines = [found["conditions"], "", "| " + " | ".join(headings) + " |", "|---" + "|--:" * len(sizes) + "|"]
    for method in dict.fromkeys(method for method, _ in rows):
        cells = [method]
        for batch, _ in sizes:
            row = rows.get((method, batch))
            cells.append(f"{row['validation_loss']:.3f} ({row['spread']:.3f}), lr {row['lr']:g}" if row else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def task_table(found: dict[str, Any]) -> str:
    """Return the table that ``benchmarks.tasks`` prints."""
    rows = [tasks.Row(**row) for row in found["rows"]]
    lines = [tasks.heading(list(rows[0].found)), *map(tasks.line, rows)]
    return "\n".join([f"{found['what']}, torch {found['torch']}:", "", *lines])


def gpu_table(found: dict[str, Any]) -> str:
    """Return the table of the list of a billion parameters."""
    (rows,) = (work["rows"] for work in found["workloads"] if work["workload"] == BILLION)
    lines = [
        f"292 tensors, 1.0B parameters, {found['device']}, torch {found['torch']}, Triton {found['triton']}:",
        "",
        "| step | bytes a parameter | ms | of a copy's bandwidth | time / ours |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        ms, share, ratio = row["quartiles_ms"][1], row["of_copy"][1], row["times_ours"][1]
        lines.append(f"| {row['name']} | {row['bytes_per_parameter']} | {ms:.2f} | {share:.3f} | {ratio:.2f}x |")
    return "\n".join(lines)


def gpu_tables(found: dict[str, Any]) -> str:
    """Return the tables that ``benchmarks.roofline`` prints."""
    shown = f"float32 unless said otherwise, {found['device']}, torch {found['torch']}"
    return "\n\n".join(roofline.table(work, shown) for work in found["workloads"])


def curves_table(found: dict[str, Any]) -> str:
    """Return the table of validation losses during training."""
    losses: dict[str, dict[str, float]] = found["validation_loss"]
    at = [m for m in next(iter(losses.values())) if int(m) % 200 == 0]
    lines = [
        f"{found['what']}, {found['device']}, torch {found['torch']}:",
        "",
        f"| microbatches | {' | '.join(f'{int(m):,}' for m in at)} |",
        "|---" + "|--:" * len(at) + "|",
    ]
    for method, by_microbatch in losses.items():
        lines.append(f"| {method} | {' | '.join(f'{by_microbatch[m]:.3f}' for m in at)} |")
    return "\n".join(lines)


def _load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found


def sections() -> dict[str, dict[str, str]]:
    """Return the generated parts of each page by the name of their markers."""
    made = {name: (TAKEN[name][0], ranking) for name in ("small", "long", "rotated", "waiting", "lasting")}
    made |= {name: (TAKEN[name][0], ranking) for name in ("updates", "wide", "same-rate")}
    made["batches"] = (TAKEN["batches"][0], batches_table)
    made |= {name: (TAKEN[name][0], depth_table) for name in ("depth", "depth-rotated")}
    made["rates"] = (TAKEN["rates"][0], rates_table)
    made |= {name: (f"{name}.json", task_table) for name in TASKS}
    made["gpu-training"] = ("gpu-training.json", curves_table)
    methods = {name: make(_load(file)) for name, (file, make) in made.items() if (RESULTS / file).exists()}
    kernels = {"gpu": gpu_tables(_load(GPU))}
    return {"README.md": readme_sections(), "docs/methods.md": methods, "docs/kernels.md": kernels}


def readme_sections() -> dict[str, str]:
    """Return the generated parts of the README."""
    steps = [
        step_table(_load(name)) for name in ("cpu-gpt2-small.json", "cpu-gpt2-small-bfloat16.json", "cpu-tiny.json")
    ]
    parts = {"demo": demo_table(_load(TAKEN["demo"][0])), "step": "\n\n".join(steps), "gpu": gpu_table(_load(GPU))}
    if (RESULTS / SUMMARY).exists():
        parts["summary"] = summary_table(_load(SUMMARY))
    return parts


def fill(page: str, parts: dict[str, str]) -> str:
    """Return the page with every part between its markers, ``<!-- name -->`` and ``<!-- /name -->``."""
    for name, text in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(page):
            raise ValueError(f"the page has no place for {name}: add <!-- {name} --> and <!-- /{name} -->")
        page = pattern.sub(lambda match, text=text: match[1] + text + "\n" + match[2], page)  # type: ignore[misc]
    return page


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    for name in TAKEN:
        parser.add_argument(
            f"--{name}", type=Path, metavar="DIR", help="folder of a finished comparison to copy (default: none)"
        )
    parser.add_argument("--commit", default=commit(), help="commit that ran the comparisons (default: the newest)")
    given = vars(parser.parse_args(arguments))
    ran = given.pop("commit")
    for name, folder in given.items():
        if folder is not None:
            record(folder, *TAKEN[name.replace("_", "-")], ran)
    for name, parts in sections().items():
        path = ROOT / name
        path.write_text(fill(path.read_text(), parts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
