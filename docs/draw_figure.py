"""Draws docs/how_it_works.png: the schedule and the ring. ``python docs/draw_figure.py``"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

matplotlib.use("Agg")
FORWARD, BACKWARD, IDLE = "#9ec5e8", "#f3b183", "#f2f2f2"
STAGES, MICROBATCHES, SHOWN = 4, 12, 22


def schedule() -> dict[tuple[int, int], tuple[str, int]]:
    """(stage, time) -> ("F" or "B", microbatch) of never-flushing 1F1B, forward and backward one unit each."""
    cells: dict[tuple[int, int], tuple[str, int]] = {}
    forward_done: dict[tuple[int, int], int] = {}
    backward_done: dict[tuple[int, int], int] = {}
    order = []
    for i in range(STAGES):
        warm = STAGES - 1 - i
        order.append([("F", m) for m in range(warm)])
        for m in range(MICROBATCHES):
            order[i] += [("F", m + warm), ("B", m)]
    for time in range(SHOWN):
        done = []
        for i, todo in enumerate(order):
            kind, m = todo[0]
            if kind == "F":
                ready = i == 0 or forward_done.get((i - 1, m), SHOWN) < time
            else:
                ready = i == STAGES - 1 or backward_done.get((i + 1, m), SHOWN) < time
            if ready:
                cells[i, time] = todo.pop(0)
                done.append((i, kind, m))
        for i, kind, m in done:
            (forward_done if kind == "F" else backward_done)[i, m] = time
    return cells


def draw_schedule(axes: Axes) -> None:
    for i in range(STAGES):
        axes.add_patch(Rectangle((0, -i - 0.9), SHOWN, 0.8, color=IDLE))
    for (i, time), (kind, m) in schedule().items():
        colour = FORWARD if kind == "F" else BACKWARD
        axes.add_patch(Rectangle((time, -i - 0.9), 0.96, 0.8, color=colour))
        axes.text(time + 0.48, -i - 0.5, str(m), ha="center", va="center", fontsize=8)
    for i in range(STAGES):
        delay = STAGES - 1 - i
        axes.text(-0.3, -i - 0.5, f"stage {i + 1}", ha="right", va="center", fontsize=9)
        axes.text(SHOWN + 0.3, -i - 0.5, rf"$\tau$ = {delay}, ring of {delay + 1}", va="center", fontsize=9)
    axes.set_xlim(-3, SHOWN + 5.5)
    axes.set_ylim(-STAGES - 0.1, 0.1)
    axes.set_title(
        "Never flushing: every backward (orange) is followed by an update, so a gradient is late by τ updates",
        fontsize=10,
        loc="left",
    )
    axes.axis("off")


def draw_ring(axes: Axes) -> None:
    slots = [
        ("v8  →  v12", "gradient g of its\nmicrobatch is in:\nfree to be written"),
        ("v9", "in flight"),
        ("v10", "in flight"),
        ("v11", "newest"),
    ]
    for k, (label, note) in enumerate(slots, start=1):
        x = 2.4 * k
        face = "#cfe8cf" if note == "newest" else BACKWARD if "free" in note else "white"
        axes.add_patch(Rectangle((x, 0), 2.0, 0.8, facecolor=face, edgecolor="#444444"))
        axes.text(x + 1.0, 0.4, label, ha="center", va="center", fontsize=9)
        axes.text(x + 1.0, -0.12, note, ha="center", va="top", fontsize=8, color="#444444")
    axes.add_patch(Rectangle((13.2, 0), 4.4, 0.8, facecolor="#eeeeee", edgecolor="#444444"))
    axes.text(15.4, 0.4, "one pass over memory", ha="center", va="center", fontsize=9)
    axes.text(15.4, -0.12, "m, v updated in place", ha="center", va="top", fontsize=8, color="#444444")
    read = FancyArrowPatch((11.6, 0.4), (13.1, 0.4), arrowstyle="-|>", mutation_scale=12, color="#2f7d32")
    write = FancyArrowPatch(
        (15.4, 0.85), (3.4, 0.85), connectionstyle="arc3,rad=0.16", arrowstyle="-|>", mutation_scale=12, color="#c0601a"
    )
    axes.add_patch(read)
    axes.add_patch(write)
    axes.text(12.35, 0.5, "read w, g", ha="center", va="bottom", fontsize=8, color="#2f7d32")
    axes.text(9.4, 1.95, "write the next version: nothing is copied", ha="center", fontsize=8, color="#c0601a")
    axes.text(
        18.1,
        0.4,
        "16 B read + 12 B written\nper fp32 parameter, with\nor without the ring",
        va="center",
        fontsize=9,
    )
    axes.text(-0.2, 0.4, "ring of\nstage 1", ha="center", va="center", fontsize=9)
    axes.set_xlim(-3, SHOWN + 5.5)
    axes.set_ylim(-0.9, 2.3)
    axes.set_title("The step that turns version 11 into version 12 on stage 1", fontsize=10, loc="left")
    axes.axis("off")


def main() -> None:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(11, 4.6), height_ratios=[1.5, 1])
    draw_schedule(top)
    draw_ring(bottom)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("how_it_works.png"), dpi=130)


if __name__ == "__main__":
    main()
