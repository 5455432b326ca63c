"""Write the measured tables of the README and of docs/ from the committed results: ``python -m benchmarks.tables``.

``--demo runs/demo``, ``--small runs/small``, ``--long DIR``, ``--depth DIR``, ``--rotated DIR``, ``--waiting DIR`` and
``--lasting DIR`` first copy the results of the demo, of ``make compare-small``, of a longer comparison, of a comparison
by depth, of the rotated rules, of those that wait for their gradients, or of a longer comparison of rotated rules.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import tasks
from benchmarks.step import commit, processor
from benchmarks.step import table as step_table
from benchmarks.summary import table as summary_table
from nesterov_pp.training.results import depth_markdown, family_of, markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SUMMARY = "cpu-summary.json"
TAKEN = {
    "demo": ("cpu-demo.json", "demo.png"),
    "small": ("compare-small.json", "compare-small.png"),
    "long": ("compare-long.json", "compare-long.png"),
    "depth": ("compare-depth.json", "compare-depth.png"),
    "rotated": ("compare-rotated.json", "compare-rotated.png"),
    "waiting": ("compare-waiting.json", "compare-waiting.png"),
    "lasting": ("compare-lasting.json", "compare-lasting.png"),
}
"""The files of each finished comparison, in the results and in docs/, by the flag that names its folder."""


def record(folder: Path, results: str, plot: str) -> None:
    """Keep a finished comparison's table and plot, with the machine they were measured on."""
    found = json.loads((folder / "compare.json").read_text())
    configs = [json.loads(path.read_text())["config"] for path in folder.rglob("config.json")]
    config, depths = configs[0], {config["stages"] for config in configs}
    several = any(len(row.get("by_lr", ())) > 1 for row in found["methods"])
    found["conditions"] = (
        (f"{config['stages']} stages, " if len(depths) == 1 else "")
        + f"{config['layers']} layers of width {config['width']}, "
        f"{config['microbatches']:,} microbatches of {config['batch']} x {config['context']} bytes, "
        + ("" if several else f"lr {config['lr']:g}, ")
        + f"warm-up {config['warmup']}, "
        + (f"embeddings at {config['embedding_lr']:g} times the rate, " if config["embedding_lr"] != 1.0 else "")
        + f"{processor()}, one thread a run, torch {torch.__version__}:"
    )
    found["commit"] = commit()
    (RESULTS / results).write_text(json.dumps(found, indent=1) + "\n")
    shutil.copyfile(folder / "compare.png", ROOT / "docs" / plot)


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


def task_table(found: dict[str, Any]) -> str:
    """Return the table that ``benchmarks.tasks`` prints."""
    rows = [tasks.Row(**row) for row in found["rows"]]
    lines = [tasks.heading(list(rows[0].found)), *map(tasks.line, rows)]
    return "\n".join([f"{found['what']}, torch {found['torch']}:", "", *lines])


def _load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found


def sections() -> dict[str, dict[str, str]]:
    """Return the generated parts of each page by the name of their markers."""
    made = {name: (TAKEN[name][0], ranking) for name in ("small", "long", "rotated", "waiting", "lasting")}
    made["depth"] = (TAKEN["depth"][0], depth_table)
    made |= {name: (f"{name}.json", task_table) for name in ("images", "continuation", "language")}
    methods = {name: make(_load(file)) for name, (file, make) in made.items() if (RESULTS / file).exists()}
    return {"README.md": readme_sections(), "docs/methods.md": methods}


def readme_sections() -> dict[str, str]:
    """Return the generated parts of the README."""
    steps = [
        step_table(_load(name)) for name in ("cpu-gpt2-small.json", "cpu-gpt2-small-bfloat16.json", "cpu-tiny.json")
    ]
    parts = {"demo": demo_table(_load(TAKEN["demo"][0])), "step": "\n\n".join(steps)}
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
    for name, folder in vars(parser.parse_args(arguments)).items():
        if folder is not None:
            record(folder, *TAKEN[name])
    for name, parts in sections().items():
        path = ROOT / name
        path.write_text(fill(path.read_text(), parts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
