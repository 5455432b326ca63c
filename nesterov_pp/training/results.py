"""The table of a comparison, from the summaries and validation curves of its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from nesterov_pp.pipeline import recipes
from nesterov_pp.terminal import Table
from nesterov_pp.training.metrics import Curves
from nesterov_pp.training.report import perplexity, size

UNCORRECTED = {"adam": "pipedream", "rotated": "pipedream-rotated"}
"""For each family of rules, the method that takes late gradients as they come."""

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
_PLANNED = "Planned time"
_LEFT_OUT = ("Perplexity", "Train loss", "Optimizer time", "Peak memory")
_RELATIVE: dict[str, Callable[[float], str]] = {
    "slowdown": lambda x: f"{x:.2f}x",
    "recovered": lambda x: f"{100.0 * x:.0f} %",
    "ahead": lambda x: f"{x:+.3f}",
}
_RELATIVE_HEADINGS = {"slowdown": "Slowdown", "recovered": "Recovered", "ahead": "Ahead of gpipe"}


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one row: means over a method's runs, each seed's validation loss, and their spread (highest - lowest)."""
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


def with_planned_time(row: dict[str, Any], seconds: Mapping[str, float], microbatches: int) -> dict[str, Any]:
    """Return the row with ``planned_seconds``, the time of the whole run, if its method's is known."""
    per_microbatch = seconds.get(row["method"])
    return row if per_microbatch is None else {**row, "planned_seconds": per_microbatch * microbatches}


def mean_curve(curves: Sequence[Curves]) -> list[tuple[int, float]]:
    """Return the points (microbatches, mean validation loss over runs)."""
    return [
        (points[0][0], fmean(loss for _, loss in points))
        for points in zip(*(c.validation for c in curves), strict=True)
    ]


def best_rates(rows: Sequence[dict[str, Any]], *, every_seed: bool = False) -> list[dict[str, Any]]:
    """Return, for each method, the row of the learning rate at which its first seed has the lowest loss.

    ``by_lr`` holds the losses of that seed: the other seeds run at the best rate only, and have no part in the choice.
    With ``every_seed``, all seeds have run at all rates, ``by_lr`` holds their means, and the lowest mean is best; a
    rate at which some seed failed is not chosen while another has them all. ``losses_by_lr`` has all seeds' losses.
    """
    of_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of_method.setdefault(row["method"], []).append(row)

    def judged_by(row: Mapping[str, Any]) -> float:
        return float(row["validation_loss"] if every_seed else row["validation_losses"][0])

    def order(row: dict[str, Any]) -> tuple[int, float]:
        return (-len(row["validation_losses"]) if every_seed else 0, judged_by(row))

    best = []
    for tried in of_method.values():
        chosen = min(tried, key=order)
        by_lr = {str(row["lr"]): judged_by(row) for row in tried}
        losses = {str(row["lr"]): row["validation_losses"] for row in tried}
        best.append({**chosen, "by_lr": by_lr, "losses_by_lr": losses})
    return best


def relate(rows: Sequence[dict[str, Any]], curves: Mapping[str, Sequence[tuple[int, float]]]) -> list[dict[str, Any]]:
    """Return the rows with ``rule`` and what follows from methods of the same family of rules, None without these.

    ``slowdown``: tokens of the method over tokens of the undelayed run to the lowest loss that both have reached.
    ``recovered``: (uncorrected - method) / (uncorrected - undelayed), in final losses.
    ``ahead``: how far the method's final loss is below that of the pipeline that waits.

    The undelayed run and the waiting one are the best of their family, with whichever of its rules.
    """
    final = {row["method"]: row["validation_loss"] for row in rows}
    related = []
    for row in rows:
        family = family_of(row["method"])
        undelayed = _best(final, family, lambda name: _is(name, "gpipe-1"))
        waiting = _best(final, family, lambda name: _is(name, "gpipe") and not _is(name, "gpipe-1"))
        baseline = _best(final, family, UNCORRECTED.get(family, "").__eq__)
        uncorrected = None if baseline is None else final[baseline]
        slowdown = recovered = None
        if undelayed is not None:
            level = max(min(loss for _, loss in curves[name]) for name in (row["method"], undelayed))
            slowdown = first_reaching(curves[row["method"]], level) / first_reaching(curves[undelayed], level)
        if undelayed is not None and uncorrected is not None and uncorrected != final[undelayed]:
            recovered = (uncorrected - row["validation_loss"]) / (uncorrected - final[undelayed])
        ahead = None if waiting is None else final[waiting] - row["validation_loss"]
        related.append({**row, "rule": family, "slowdown": slowdown, "recovered": recovered, "ahead": ahead})
    return related


def relate_depths(
    by_depth: Mapping[int, Sequence[dict[str, Any]]], curves: Mapping[int, Mapping[str, Sequence[tuple[int, float]]]]
) -> dict[int, list[dict[str, Any]]]:
    """Return the rows with ``reached``, the lowest loss that the method reaches at every number of stages, and
    ``relative_tokens``, the tokens to this loss over those at the smallest number of stages.

    A method that lacks a number of stages is related over those that it has.
    """
    shallowest: dict[str, float] = {}
    related: dict[int, list[dict[str, Any]]] = {}
    for depth, rows in by_depth.items():
        related[depth] = []
        for row in rows:
            method = row["method"]
            level = max(min(loss for _, loss in of[method]) for of in curves.values() if method in of)
            tokens = first_reaching(curves[depth][method], level)
            ratio = tokens / shallowest.setdefault(method, tokens)
            related[depth].append({**row, "reached": level, "relative_tokens": ratio})
    return related


def family_of(method: str) -> str:
    """Return the family of a method's rule; that of a name that is no recipe is "adam"."""
    recipe = recipes().get(_name(method))
    return "adam" if recipe is None else recipe.family


def _best(final: Mapping[str, float], family: str, chosen: Callable[[str], bool]) -> str | None:
    """Return the method with the lowest loss of those in a family whose name is chosen, or None."""
    found = [m for m in final if chosen(_name(m)) and family_of(m) == family]
    return min(found, key=lambda m: final[m], default=None)


def _name(method: str) -> str:
    """Return the name of a method without the hyper-parameters that follow it."""
    return method.partition(":")[0]


def _is(name: str, schedule: str) -> bool:
    return name == schedule or name.startswith(f"{schedule}-")


def edges(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each method whose best learning rate lies at the edge of those tried."""
    found = []
    for row in rows:
        tried = sorted(map(float, row.get("by_lr", ())))
        if len(tried) > 1 and row["lr"] in (tried[0], tried[-1]):
            side = "smaller" if row["lr"] == tried[0] else "larger"
            found.append(
                f"The best learning rate of {row['method']}, {row['lr']:g}, lies at the edge of those tried; "
                f"a {side} one may be better."
            )
    return found


def first_reaching(curve: Sequence[tuple[int, float]], level: float) -> float:
    """Return the number of microbatches, interpolated, at which a curve first comes down to ``level``.

    Raises:
        ValueError: the curve stays above ``level``.
    """
    before: tuple[int, float] | None = None
    for m, loss in curve:
        if loss <= level:
            if before is None:
                return float(m)
            share = (before[1] - level) / (before[1] - loss)
            return before[0] + share * (m - before[0])
        before = (m, loss)
    raise ValueError(f"the curve stays above {level}")


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence that compares the first method's validation loss with the others', whichever is lower."""
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


def table(rows: Sequence[Mapping[str, Any]], title: str = "Comparison") -> Table:
    """Return the table for the terminal, without the columns that a line has no room for."""
    headings, shown = _headings(rows), _shown(rows)
    result = Table(title=title)
    for i in shown:
        heading = headings[i]
        result.add_column(
            heading, justify="left" if heading == "Method" else "right", no_wrap=heading in ("Method", "Each seed")
        )
    for row in rows:
        cells = _cells(row, rows)
        result.add_row(*(cells[i] for i in shown))
    return result


def markdown(rows: Sequence[Mapping[str, Any]], conclusion: str, *, brief: bool = False) -> str:
    """Return the table as the text of a Markdown file; if ``brief``, with the columns that ``table`` shows."""
    headings = _headings(rows)
    shown = _shown(rows) if brief else range(len(headings))

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells[i] for i in shown) + " |"

    lines = [line(headings), "|---" + "|--:" * (len(shown) - 1) + "|"]
    lines += [line(_cells(row, rows)) for row in rows]
    return "\n".join([*lines, "", conclusion]).rstrip() + "\n"


def depth_markdown(by_depth: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    """Return a Markdown table of the validation loss of each method (rows) at each number of stages (columns).

    If ``relate_depths`` has related the depths, a second row of each method has its tokens to the loss they all reach.
    """
    found = {(row["method"], n): row for n, rows in by_depth.items() for row in rows}
    lines = ["| Stages | " + " | ".join(map(str, by_depth)) + " |", "|---" + "|--:" * len(by_depth) + "|"]

    def line(name: str, method: str, cell: Callable[[Mapping[str, Any]], str]) -> str:
        cells = [cell(found[method, n]) if (method, n) in found else "failed" for n in by_depth]
        return f"| {name} | " + " | ".join(cells) + " |"

    for method in dict.fromkeys(method for method, _ in found):
        lines.append(line(method, method, lambda row: f"{row['validation_loss']:.4f}"))
        level = next(row.get("reached") for (name, _), row in found.items() if name == method)
        if level is not None:
            name = f"{method}, tokens to {level:.3f}"
            lines.append(line(name, method, lambda row: f"{row['relative_tokens']:.2f}x"))
    return "\n".join(lines) + "\n"


def _headings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    rates = ["lr"] if _several_rates(rows) else []
    related = [_RELATIVE_HEADINGS[name] for name in _related(rows)]
    planned = [_PLANNED] if _are_planned(rows) else []
    return [_HEADINGS[0], *rates, *_HEADINGS[1:], *(["Rule", *related] if related else ()), *planned]


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the numbers of the columns that a terminal has room for."""
    left_out = _LEFT_OUT if _related(rows) else ()
    return [i for i, heading in enumerate(_headings(rows)) if heading not in left_out]


def _several_rates(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(len(row.get("by_lr", ())) > 1 for row in rows)


def _are_planned(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any("planned_seconds" in row for row in rows)


def _related(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return which of the relations of ``relate`` at least one row has."""
    return [name for name in _RELATIVE if any(row.get(name) is not None for row in rows)]


def _cells(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [
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
    if _several_rates(rows):
        cells.insert(1, f"{row['lr']:g}")
    if related := _related(rows):
        values = {name: row.get(name) for name in related}
        cells += [row["rule"], *("-" if x is None else _RELATIVE[name](x) for name, x in values.items())]
    if _are_planned(rows):
        cells.append(f"{row['planned_seconds']:.1f} s" if "planned_seconds" in row else "-")
    return cells
