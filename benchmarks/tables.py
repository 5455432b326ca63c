"""Writes the README's measured tables from the committed results.

``python -m benchmarks.tables``; with ``--demo runs/demo`` the results of that demo are taken over first.
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

from benchmarks.step import commit, processor
from benchmarks.step import table as step_table
from benchmarks.summary import table as summary_table
from nesterov_pp.training.comparison import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SUMMARY = "cpu-summary.json"


def record_demo(folder: Path) -> None:
    """Keep a finished demo's table and plot, with the machine they were measured on."""
    found = json.loads((folder / "compare.json").read_text())
    config = json.loads(next(folder.glob("*/*/config.json")).read_text())["config"]
    found["conditions"] = (
        f"{config['stages']} stages, {config['layers']} layers of width {config['width']}, "
        f"{config['microbatches']:,} microbatches of {config['batch']} x {config['context']} bytes, "
        f"lr {config['lr']:g}; {processor()}, two runs at a time on one thread each, torch {torch.__version__}:"
    )
    found["commit"] = commit()
    (RESULTS / "cpu-demo.json").write_text(json.dumps(found, indent=1) + "\n")
    shutil.copyfile(folder / "compare.png", ROOT / "docs" / "demo.png")


def demo_table(found: dict[str, Any]) -> str:
    return f"{found['conditions']}\n\n{markdown(found['methods'], found['comparison'])}".rstrip()


def sections() -> dict[str, str]:
    """The README's generated parts by the name of their markers."""

    def load(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((RESULTS / name).read_text())
        return found

    steps = [
        step_table(load(name)) for name in ("cpu-gpt2-small.json", "cpu-gpt2-small-bfloat16.json", "cpu-tiny.json")
    ]
    parts = {"demo": demo_table(load("cpu-demo.json")), "step": "\n\n".join(steps)}
    if (RESULTS / SUMMARY).exists():
        parts["summary"] = summary_table(load(SUMMARY))
    return parts


def fill(readme: str, parts: dict[str, str]) -> str:
    """The README with every part between its markers, ``<!-- name -->`` and ``<!-- /name -->``."""
    for name, text in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(readme):
            raise ValueError(f"the README has no place for {name}: add <!-- {name} --> and <!-- /{name} -->")
        readme = pattern.sub(lambda match, text=text: match[1] + text + "\n" + match[2], readme)  # type: ignore[misc]
    return readme


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--demo", type=Path, metavar="DIR", help="a finished demo to take over")
    options = parser.parse_args(arguments)
    if options.demo is not None:
        record_demo(options.demo)
    path = ROOT / "README.md"
    path.write_text(fill(path.read_text(), sections()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
