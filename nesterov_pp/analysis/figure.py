"""The plot of ``python -m nesterov_pp analyze``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from nesterov_pp.analysis import delays as kinds
from nesterov_pp.analysis.delays import Delay
from nesterov_pp.analysis.rules import linear_rule
from nesterov_pp.analysis.sdde import damping, fastest_rate, stability_edge
from nesterov_pp.analysis.stability import max_stable_step, spectral_radius
from nesterov_pp.colours import COLOURS, LINES

_SIZE = (12.0, 9.0)
_DPI = 130


def draw(file: IO[bytes], delay: int, momentum: float, delays: Sequence[Delay]) -> None:
    """Draw four panels as a PNG: the edge against the delay, against the horizon, the speed, and the SDDE."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    (edges, horizons), (speeds, damped) = figure.subplots(2, 2)
    _draw_edges(edges, delay, momentum)
    _draw_horizons(horizons, delay, momentum)
    _draw_speeds(speeds, delay, momentum)
    _draw_damping(damped, [kinds.fixed(delay), *delays])
    for axes in (edges, horizons, speeds, damped):
        axes.grid(color="0.9", which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(edgecolor="none", framealpha=0.9, fontsize=9, handlelength=3.5)
    figure.savefig(file, format="png")


def _style(k: int) -> dict[str, Any]:
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": LINES[k % len(LINES)], "linewidth": 1.8}


def _edge(rule: str, delay: int, momentum: float, horizon: float | None = None) -> float:
    # With a ``Delay`` the edge is found on the unit circle, which takes milliseconds at any delay.
    return max_stable_step(rule, momentum=momentum, delay=kinds.fixed(delay), horizon=horizon)


def _draw_edges(axes: Any, delay: int, momentum: float) -> None:
    longest = max(32, 2 * delay)
    late = np.unique(np.geomspace(1, longest, 40).astype(int))
    shown: list[tuple[str, str, bool]] = [
        ("SGD", "sgd", False),
        ("averaged momentum, no look-ahead", "ema", False),
        ("Nesterov: one update ahead", "nag", False),
        ("Nesterov: the delay ahead", "nag", True),
        ("extrapolation: the delay ahead", "extrapolation", True),
    ]
    for k, (label, rule, matched) in enumerate(shown):
        values = [_edge(rule, int(tau), momentum, float(tau) if matched else None) for tau in late]
        axes.loglog(late, values, label=label, **_style(k))
    axes.axvline(delay, color="0.6", linewidth=1.0)
    axes.set_xlabel("delay (updates)")
    axes.set_ylabel("largest stable step size x curvature")
    axes.set_title(f"How large a step a delay allows (momentum {momentum:g})")


def _draw_horizons(axes: Any, delay: int, momentum: float) -> None:
    ahead = np.linspace(0.0, 4.0 * delay, 121)
    for k, gamma in enumerate(sorted({0.9, 0.97, momentum})):
        values = np.array([_edge("nag", delay, gamma, float(h)) for h in ahead])
        best = int(values.argmax())
        label = f"momentum {gamma:g}: {values[best]:.3g} at {ahead[best]:.1f}"
        axes.plot(ahead, values, label=label, **_style(k))
        axes.plot(ahead[best], values[best], "o", color=COLOURS[k], markersize=5)
    axes.axhline(_edge("sgd", delay, momentum), color="0.3", linewidth=1.0, linestyle=":", label="SGD")
    for h in (1.0, float(delay)):
        axes.axvline(h, color="0.6", linewidth=1.0)
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("horizon of the look-ahead (updates)")
    axes.set_ylabel("largest stable step size x curvature")
    axes.set_title(f"How far to look ahead at delay {delay} (lines: 1 and the delay)")


def _draw_speeds(axes: Any, delay: int, momentum: float) -> None:
    shown: list[tuple[str, str, float | None]] = [
        ("SGD", "sgd", None),
        ("averaged momentum, no look-ahead", "ema", None),
        ("Nesterov: one update ahead", "nag", None),
        ("Nesterov: the delay ahead", "nag", float(delay)),
    ]
    for k, (label, name, horizon) in enumerate(shown):
        edge = _edge(name, delay, momentum, horizon)
        rule = linear_rule(name, momentum=momentum, horizon=horizon)
        steps = edge * np.concatenate([np.geomspace(1e-3, 0.3, 80, endpoint=False), np.linspace(0.3, 0.9999, 80)])
        values = [math.log(10.0) / -math.log(spectral_radius(rule, delay, float(a))) for a in steps]
        axes.loglog(steps, values, label=label, **_style(k))
    axes.set_ylim(top=1e5)
    axes.set_xlabel("step size x curvature")
    axes.set_ylabel("updates until the error is a tenth")
    axes.set_title(f"How fast a quadratic is solved at delay {delay} (momentum {momentum:g})")


def _draw_damping(axes: Any, delays: Sequence[Delay]) -> None:
    for k, delay in enumerate(delays):
        # Includes the peak itself.
        scaled = np.sort(np.append(np.linspace(0.02, 2.0, 67), fastest_rate(delay) * delay.mean))
        decays = []
        for b in scaled:
            try:
                decays.append(damping(float(b) / delay.mean, delay).decay * delay.mean)
            except ValueError:
                decays.append(math.nan)
        edge = stability_edge(delay) * delay.mean
        label = f"{delay.name}: " + ("no edge" if math.isinf(edge) else f"edge {edge:.2f}")
        axes.plot(scaled, decays, label=label, **_style(k))
    for b, name in ((1.0 / math.e, "1/e"), (math.pi / 2.0, "π/2")):
        axes.axvline(b, color="0.6", linewidth=1.0)
        axes.annotate(name, (b, 1.0), xycoords=("data", "axes fraction"), ha="center", fontsize=9)
    axes.axhline(0.0, color="0.3", linewidth=1.0)
    axes.set_xlabel("step size x curvature x mean delay")
    axes.set_ylabel("decay rate x mean delay")
    axes.set_title("SGD as a delay differential equation", pad=16)
