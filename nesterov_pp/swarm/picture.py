"""The timeline of a swarm: what every worker did, when workers came and went, and the loss."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from nesterov_pp.colours import COLOURS

_KINDS = ("forward", "backward", "step")
Span = tuple[str, int, float, float]


def read_timeline(path: Path) -> dict[str, list[Span]]:
    """Return the spans ``(kind, number, begin, end)`` of every worker; times are seconds of ``time.time``."""
    found: dict[str, list[Span]] = {}
    for line in path.read_bytes().split(b"\n")[:-1]:
        row = json.loads(line)
        found.setdefault(row["worker"], []).extend((k, n, b, e) for k, n, b, e in row["events"])
    return found


def draw(
    file: IO[bytes],
    spans: Mapping[str, Sequence[Span]],
    events: Sequence[Mapping[str, Any]],
    losses: Sequence[float],
) -> None:
    """Draw a row for each worker, by stage, and below it the losses in the order in which they were counted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    born = {event["worker"]: event for event in events if event["kind"] == "joined"}
    rows = sorted(born, key=lambda name: (born[name]["stage"], born[name]["t"]))
    start = min((event["t"] for event in events), default=0.0)
    end = max([event["t"] for event in events] + [e for own in spans.values() for _, _, _, e in own], default=start)
    height = 1.6 + 0.42 * len(rows)
    figure, (axes, below) = plt.subplots(2, 1, figsize=(11, height + 2.4), height_ratios=[height, 2.0])
    for row, name in enumerate(rows):
        for k, kind in enumerate(_KINDS):
            boxes = [(b - start, e - b) for what, _, b, e in spans.get(name, ()) if what == kind]
            axes.broken_barh(boxes, (row - 0.35, 0.7), facecolors=COLOURS[k], label=kind if row == 0 else None)
        for event in events:
            if event.get("worker") == name and event["kind"] in ("ready", "left"):
                left = event["kind"] == "left"
                axes.plot(event["t"] - start, row, "kX" if left else "k>", markersize=9 if left else 6, zorder=3)
    first = [row for row, name in enumerate(rows) if row and born[name]["stage"] != born[rows[row - 1]]["stage"]]
    for row in first:
        axes.axhline(row - 0.5, color="0.4", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"stage {born[name]['stage'] + 1}: {name}" for name in rows])
    axes.invert_yaxis()
    axes.set_xlim(0.0, max(end - start, 1e-3))
    axes.set_xlabel("seconds (triangle: has the weights, cross: gone)")
    axes.legend(loc="upper right", ncols=3, fontsize=8)
    below.plot(range(1, len(losses) + 1), losses, color="0.75", linewidth=0.7, label="each microbatch")
    window = max(1, len(losses) // 30)
    means = [sum(losses[max(0, i - window) : i]) / min(i, window) for i in range(1, len(losses) + 1)]
    below.plot(range(1, len(losses) + 1), means, color=COLOURS[0], label=f"mean over {window}")
    below.set_xlabel("microbatches, in the order in which the last stage counted them")
    below.set_ylabel("loss (nats per token)")
    below.legend(loc="upper right", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
