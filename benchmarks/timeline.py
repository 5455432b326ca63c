"""A run's events as a picture, and as JSON for Perfetto."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nesterov_pp.pipeline.distributed.timeline import Event, chrome_trace

_COLOURS = {"forward": "#9ec5e8", "backward": "#f3b183", "step": "#7a9e5f", "wait": "#e6e6e6"}


def write(events: Sequence[Sequence[Any]], folder: Path) -> None:
    """Write ``timeline.png`` and ``timeline.json`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [Event(*e) for e in events]
    (folder / "timeline.json").write_text(chrome_trace(rows))
    draw(rows, folder / "timeline.png")


def draw(events: Sequence[Event], path: Path) -> None:
    """Draw one row per stage; the number in a box is the number of the microbatch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    stages = max(e.stage for e in events) + 1
    start = min(e.begin for e in events if e.kind == "forward")
    figure, axes = plt.subplots(figsize=(14, 0.7 * stages + 1), layout="constrained")
    for e in events:
        if e.kind not in _COLOURS:
            continue
        left, width = 1e3 * (e.begin - start), 1e3 * (e.end - e.begin)
        axes.barh(-e.stage, width, left=left, height=0.8, color=_COLOURS[e.kind], edgecolor="white", linewidth=0.3)
        if e.kind in ("forward", "backward"):
            axes.text(left + width / 2, -e.stage, str(e.number), ha="center", va="center", fontsize=6, clip_on=True)
    axes.set_yticks([-k for k in range(stages)], [f"stage {k}" for k in range(stages)])
    axes.set_xlabel("milliseconds")
    axes.set_xlim(0.0, 1e3 * (max(e.end for e in events) - start))
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [Patch(color=colour, label=kind) for kind, colour in _COLOURS.items()]
    axes.legend(handles=handles, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.5 / stages), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
