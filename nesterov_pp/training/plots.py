"""Plots as PNG files that stay readable in black-and-white print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np

from nesterov_pp.colours import COLOURS, LINES
from nesterov_pp.training.metrics import Curves

_MANY = 8  # With more methods than this, the legend does not fit into the plot.
_FALL = 8  # A comparison shows losses up to those after an eighth of the run.
_SIZE = (8.0, 5.0)
_DPI = 150


def draw_run(file: IO[bytes], curves: Curves, method: str) -> None:
    """Draw a run's train loss (faint), its moving average, and the validation points."""
    figure, axes = _figure()
    train = np.asarray(curves.train)
    steps = np.arange(1, len(train) + 1)
    window = max(1, len(train) // 50)
    axes.plot(steps, train, color="0.8", linewidth=0.6, label="train, each microbatch")
    axes.plot(*_moving_mean(steps, train, window), color=COLOURS[0], linewidth=1.5, label=f"train, mean over {window}")
    where, losses = zip(*curves.validation, strict=True)
    axes.plot(where, losses, "o", color=COLOURS[1], markersize=4, label="validation")
    axes.set_title(f"{method}: validation loss {losses[-1]:.3f} at the end")
    axes.legend(frameon=False)
    _save(figure, file)


def draw_comparison(
    file: IO[bytes], runs: Mapping[str, Sequence[Curves]], seconds: Mapping[str, float] | None = None
) -> None:
    """Draw the validation loss of each method: the mean over its runs as a line, lowest to highest as a band.

    With many methods there are no bands, and the legend is next to the plot, with the best method last, like the lines.
    ``seconds`` has the planned time of a microbatch by method; a second panel then shows the losses over that time.
    """
    figure, axes = _figure()
    if seconds:
        figure.set_size_inches(1.6 * _SIZE[0], _SIZE[1])
        figure.clear()
        axes, timed = figure.subplots(1, 2, sharey=True)
        _prepare(axes, "microbatches")
        _prepare(timed, "planned time, one device for each stage (s)")
        timed.set_title("The same over time, simulated")
    highest, lowest, many = -np.inf, np.inf, len(runs) > _MANY
    for k, (method, curves) in enumerate(runs.items()):
        steps = [m for m, _ in curves[0].validation]
        losses = np.array([[loss for _, loss in c.validation] for c in curves])
        mean = losses.mean(axis=0)
        style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "linestyle": _line(k)}
        axes.plot(steps, mean, linewidth=1.8, label=f"{method} ({mean[-1]:.3f})", **style)
        if seconds and method in seconds:
            timed.plot(np.array(steps) * seconds[method], mean, linewidth=1.8, **style)
        if len(curves) > 1 and not many:
            axes.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=style["color"], alpha=0.2, lw=0)
        highest = max(highest, losses[:, len(steps) // _FALL].max())
        lowest = min(lowest, losses.min())
    # The initial drop is much the same for all methods; the differences come after it.
    axes.set_ylim(lowest - 0.05 * (highest - lowest + 0.1), highest + 0.05 * (highest - lowest + 0.1))
    seeds = max(len(curves) for curves in runs.values())
    axes.set_ylabel("validation loss (nats per token)")
    bands = "" if many else ", lowest to highest shaded"
    axes.set_title("Validation loss" + (f": mean of {seeds} seeds{bands}" if seeds > 1 else ""))
    lines = sorted(axes.get_lines(), key=lambda line: -line.get_ydata()[-1]) if many else axes.get_lines()
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "fontsize": 8} if many else {}
    axes.legend(handles=lines, frameon=False, title="method (loss at the end)", handlelength=3.5, **place)
    _save(figure, file)


def draw_alignment(file: IO[bytes], cosines: Mapping[int, Sequence[tuple[int, float]]], delays: Sequence[int]) -> None:
    """Draw the cosine between look-ahead and displacement over microbatches, with a moving mean for each late stage."""
    from matplotlib import colormaps

    figure, axes = _figure()
    for k, (stage, points) in enumerate(cosines.items()):
        where, values = np.array(points).T
        window = max(1, len(values) // 10)
        # From dark (input side) to light; the light end of the map is too light on white.
        colour = colormaps["viridis"](0.9 * k / max(1, len(cosines) - 1))
        label = f"stage {stage}, delay {delays[stage - 1]}: {values.mean():.2f}"
        axes.plot(where, values, color=colour, linewidth=0.5, alpha=0.25)
        smooth = _moving_mean(where, values, window)
        axes.plot(*smooth, color=colour, linestyle=LINES[k % len(LINES)], linewidth=1.8, label=label)
    axes.set_ylabel("cosine of look-ahead and displacement")
    axes.set_title("Does the look-ahead point where the weights will go? (1: exactly)")
    columns = 1 + (len(cosines) - 1) // 12
    axes.legend(edgecolor="none", title="delay in updates: mean cosine", fontsize=8, handlelength=3.5, ncols=columns)
    _save(figure, file)


def draw_depths(file: IO[bytes], by_depth: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
    """Draw the final validation loss over the number of stages: a line per method, lowest to highest seed as a bar."""
    lines: dict[str, list[tuple[float, float, Sequence[float]]]] = {}
    for n, rows in by_depth.items():
        for row in rows:
            lines.setdefault(row["method"], []).append((n, row["validation_loss"], row["validation_losses"]))
    figure, axes = _with_bars(lines, "stages")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(by_depth), list(map(str, by_depth)))
    _save(figure, file)


def draw_rates(file: IO[bytes], rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the final validation loss over the learning rate: a line per method, lowest to highest seed as a bar."""
    lines = {
        row["method"]: [(float(lr), loss, row["losses_by_lr"][lr]) for lr, loss in row["by_lr"].items()] for row in rows
    }
    figure, axes = _with_bars(lines, "peak learning rate")
    axes.set_xscale("log")
    rates = sorted({x for points in lines.values() for x, _, _ in points})
    axes.set_xticks(rates, [f"{x:g}" for x in rates], fontsize=8)
    axes.minorticks_off()
    _save(figure, file)


def _with_bars(lines: Mapping[str, Sequence[tuple[float, float, Sequence[float]]]], xlabel: str) -> tuple[Any, Any]:
    """Draw a line per method through points (x, y, each seed's y), with bars from the lowest to the highest seed."""
    figure, axes = _figure()
    for k, (method, points) in enumerate(lines.items()):
        where, middle, each = zip(*sorted(points), strict=True)
        below = [max(0.0, y - min(seeds)) for y, seeds in zip(middle, each, strict=True)]
        above = [max(0.0, max(seeds) - y) for y, seeds in zip(middle, each, strict=True)]
        style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "linestyle": _line(k), "marker": "o", "ms": 4}
        axes.errorbar(where, middle, [below, above], label=method, capsize=3, **style)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend(frameon=False, handlelength=3.5)
    return figure, axes


def _moving_mean(where: Any, values: Any, window: int) -> tuple[Any, Any]:
    """Return the means of every ``window`` neighbouring values, and the middles of their places."""
    weights = np.ones(window) / window
    return np.convolve(where, weights, mode="valid"), np.convolve(values, weights, mode="valid")


def _line(k: int) -> Any:
    """Return the k-th line style; styles and colours together distinguish 36 methods, the first 6 differ in both."""
    return LINES[(k + k // len(COLOURS)) % len(LINES)]


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel("loss (nats per token)")
    _prepare(axes, "microbatches")
    return figure, axes


def _prepare(axes: Any, xlabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, file: IO[bytes]) -> None:
    figure.savefig(file, format="png")
