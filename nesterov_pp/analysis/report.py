"""What ``python -m nesterov_pp analyze`` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from nesterov_pp.analysis import delays as kinds
from nesterov_pp.analysis.alignment import noise_cosine
from nesterov_pp.analysis.convex import safe_convex_step
from nesterov_pp.analysis.delays import Delay
from nesterov_pp.analysis.mean_square import max_mean_square_step
from nesterov_pp.analysis.rules import LOOKING_AHEAD
from nesterov_pp.analysis.sdde import damping, fastest_rate, stability_edge
from nesterov_pp.analysis.stability import fastest_step, max_stable_step

_ROWS = ("sgd", "heavy-ball", "ema", "nag", "nag-undiscounted", "extrapolation")


def same_mean(delay: int) -> list[Delay]:
    """The random delays that are shown beside a fixed one by default."""
    return [kinds.uniform(0, 2 * delay), kinds.gamma(delay, 4.0), kinds.geometric(delay)]


def variants(delay: int, horizon: float | None) -> list[tuple[str, float | None]]:
    """Rules and horizons to show: each rule, and the look-aheads with the delay's horizon and the given one."""
    shown: list[tuple[str, float | None]] = []
    horizons = sorted({1.0, float(delay)} | ({horizon} if horizon is not None else set()))
    for rule in _ROWS:
        shown += [(rule, h) for h in horizons] if rule in LOOKING_AHEAD else [(rule, None)]
    return shown


def steps_table(delay: int, momentum: float, horizon: float | None) -> Table:
    """The largest stable and the fastest step of each rule."""
    table = Table(title=f"Gradients late by {delay} updates, momentum {momentum:g}: step size x curvature")
    table.add_column("Rule")
    for heading in ("Horizon", "Largest stable", "Without delay", "Fastest", "Updates to a tenth"):
        table.add_column(heading, justify="right")
    for rule, h in variants(delay, horizon):
        edge = max_stable_step(rule, momentum=momentum, delay=delay, horizon=h)
        free = max_stable_step(rule, momentum=momentum, horizon=h)
        step, radius = fastest_step(rule, momentum=momentum, delay=delay, horizon=h)
        updates = math.log(10.0) / -math.log(radius)
        ahead = "" if h is None else f"{h:g}"
        table.add_row(rule, ahead, figure(edge), figure(free), figure(step), f"{updates:,.0f}")
    return table


def delays_table(delays: Sequence[Delay]) -> Table:
    """SGD under each delay: in continuous time, and the edges update by update."""
    table = Table(title="SGD under fixed and random delays: step size x curvature")
    table.add_column("Delay", no_wrap=True)
    for heading in ("SDDE edge", "Fastest smooth", "Updates to a tenth", "Edge of the mean", "Edge of the mean square"):
        table.add_column(heading, justify="right")
    for delay in delays:
        fastest = fastest_rate(delay)
        updates = math.log(10.0) / damping(fastest, delay).decay
        sdde = [figure(stability_edge(delay)), figure(fastest), f"{updates:,.0f}"]
        table.add_row(delay.name, *sdde, *_discrete(delay))
    return table


def damping_table(delays: Sequence[Delay], step: float) -> Table:
    """How SGD behaves under each delay at one step size times curvature."""
    table = Table(title=f"SGD at step size x curvature {step:g}, as a delay differential equation")
    table.add_column("Delay", no_wrap=True)
    for heading in ("Regime", "Damping ratio", "Updates to a tenth", "Period (updates)"):
        table.add_column(heading, justify="right")
    for delay in delays:
        try:
            now = damping(step, delay)
        except ValueError:
            table.add_row(delay.name, "as the delay's tail", "", f"{math.log(10.0) / -delay.abscissa:,.0f}", "")
            continue
        updates = f"{math.log(10.0) / now.decay:,.0f}" if now.decay > 0.0 else "never"
        period = "" if math.isinf(now.period) else f"{now.period:,.0f}"
        table.add_row(delay.name, now.regime, f"{now.ratio:.2f}", updates, period)
    return table


def lines(delay: int, momentum: float) -> list[str]:
    """Sentences below the tables."""
    return [
        f"Look-ahead and displacement (Proposition 1): where gradients are noise alone their cosine is "
        f"{noise_cosine(momentum, delay):.3f} at momentum {momentum:g}; 1 is full alignment.",
        f"Convex rate O(1/t) with gamma_t = (t - 2) / t: step size x smoothness of at most "
        f"{figure(safe_convex_step(1.0, delay))} (derived on a quadratic).",
    ]


def figure(value: float) -> str:
    """A number in three digits."""
    return "none" if math.isinf(value) else f"{value:.3g}"


def _discrete(delay: Delay) -> list[str]:
    if delay.probabilities is None:
        return ["", ""]
    mean = figure(max_stable_step("sgd", delay=delay))
    try:
        return [mean, figure(max_mean_square_step("sgd", delay=delay))]
    except ValueError:
        return [mean, "too long"]
