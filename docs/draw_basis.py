"""Draws docs/analysis-basis.png: late gradients on a quadratic, in two bases. ``python docs/draw_basis.py``"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

import matplotlib
import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.optim import Optimizer

import nesterov_pp as npp
from nesterov_pp.analysis import late_on_a_quadratic
from nesterov_pp.colours import COLOURS, LINES

matplotlib.use("Agg")
DELAYS = (0, 1, 3, 7, 15, 31, 63)
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
SEEDS = (0, 1, 2)
Rule = Callable[..., Optimizer]


def nadam(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    return npp.NAdam(parameters, lr=lr, betas=(0.99, 0.99), decoupled_weight_decay=True)


def rotated(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    return npp.RotatedNAdam(parameters, lr=lr, weight_decay=0.0)


def best(rule: Rule, delay: int, turned: bool) -> float:
    """Return the mean over seeds at the best rate."""
    found = []
    for lr in RATES:
        runs = (late_on_a_quadratic(partial(rule, lr=lr), delay=delay, turned=turned, seed=s) for s in SEEDS)
        found.append(fmean(runs))
    return min(found)


def main() -> None:
    torch.set_num_threads(1)
    figure, axes = plt.subplots(figsize=(7.0, 4.2), dpi=130, layout="constrained")
    cases: list[tuple[str, Rule, bool]] = [
        ("NAdam, eigenvectors turned", nadam, True),
        ("NAdam, eigenvectors along the coordinates", nadam, False),
        ("RotatedNAdam, turned", rotated, True),
        ("RotatedNAdam, along the coordinates", rotated, False),
    ]
    for k, (label, rule, turned) in enumerate(cases):
        values = [best(rule, delay, turned) for delay in DELAYS]
        print(label, " ".join(f"{v:.2e}" for v in values))
        axes.plot(DELAYS, values, color=COLOURS[k], linestyle=LINES[k], marker="o", markersize=4, label=label)
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(DELAYS, [str(d) for d in DELAYS])
    axes.set_yscale("log")
    axes.set_xlabel("delay of the gradients (updates)")
    axes.set_ylabel("final loss / first loss")
    axes.grid(color="0.9", which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(edgecolor="none", fontsize=9)
    figure.savefig(Path(__file__).parent / "analysis-basis.png")


if __name__ == "__main__":
    main()
