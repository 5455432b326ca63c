"""The table of a comparison, from the summaries of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.table import Table

from nesterov_pp.training.report import perplexity, size

_HEADINGS = (
    "Method",
    "Validation loss",
    "Each seed",
    "Spread",
    "Perplexity",
    "Train loss",
    "Tokens/s",
    "Optimizer time",
    "Peak memory",
)


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row: means over a method's runs, with each seed's validation loss and their spread (highest - lowest)."""
    losses = [float(run["validation_loss"]) for run in runs]
    return {
        "method": runs[0]["method"],
        "seeds": [run["seed"] for run in runs],
        "validation_losses": losses,
        "validation_loss": fmean(losses),
        "spread": max(losses) - min(losses),
        "perplexity": perplexity(fmean(losses)),
        "train_loss": fmean(run["train_loss"] for run in runs),
        "tokens_per_second": fmean(run["tokens_per_second"] for run in runs),
        "optimizer_share": fmean(run["optimizer_share"] for run in runs),
        "peak_memory": max(run["peak_memory"] for run in runs),
    }


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """The first method's validation loss beside the others', whichever way it falls."""
    if len(rows) < 2:
        return ""
    first, *others = rows
    parts = []
    for other in others:
        gap = first["validation_loss"] - other["validation_loss"]
        side = "below" if gap < 0 else "above"
        spread = max(first["spread"], other["spread"])
        several = max(len(first["seeds"]), len(other["seeds"])) > 1
        against = f" ({'more' if abs(gap) > spread else 'not more'} than the spread over seeds, {spread:.3f})"
        parts.append(f"{abs(gap):.3f} {side} {other['method']}" + (against if several else ""))
    return f"Validation loss: {first['method']} is {', '.join(parts)}."


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """For the terminal."""
    result = Table(title="Comparison")
    for heading in _HEADINGS:
        result.add_column(
            heading, justify="left" if heading == "Method" else "right", no_wrap=heading in ("Method", "Each seed")
        )
    for row in rows:
        result.add_row(*_cells(row))
    return result


def markdown(rows: Sequence[Mapping[str, Any]], conclusion: str) -> str:
    """The same table as a Markdown file."""
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|---" + "|--:" * (len(_HEADINGS) - 1) + "|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join([*lines, "", conclusion]).rstrip() + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["method"],
        f"{row['validation_loss']:.4f}",
        " ".join(f"{loss:.3f}" for loss in row["validation_losses"]),
        f"{row['spread']:.4f}",
        f"{row['perplexity']:.2f}",
        f"{row['train_loss']:.4f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{100.0 * row['optimizer_share']:.1f} %",
        size(row["peak_memory"]),
    ]
