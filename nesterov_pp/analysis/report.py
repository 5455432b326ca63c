"""The tables and sentences that ``python -m nesterov_pp analyze`` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nesterov_pp.analysis import delays as kinds
from nesterov_pp.analysis.alignment import noise_cosine
from nesterov_pp.analysis.convex import safe_convex_step
from nesterov_pp.analysis.delays import Delay
from nesterov_pp.analysis.mean_square import max_mean_square_step
from nesterov_pp.analysis.rules import LOOKING_AHEAD, LinearRule, linear_rule
from nesterov_pp.analysis.sdde import damping, fastest_rate, stability_edge
from nesterov_pp.analysis.stability import fastest_step, max_stable_step
from nesterov_pp.terminal import Table

NADAM_UPDATES = (1_000, 10_000, 50_000)
"""The updates at which NAdam is shown; its scalars change slowly over training."""


def same_mean(delay: int) -> list[Delay]:
    """Return the random delays that are shown next to a fixed one by default."""
    return [kinds.uniform(0, 2 * delay), kinds.gamma(delay, 4.0), kinds.geometric(delay)]


def variants(delay: int, momentum: float, horizon: float | None) -> list[tuple[str, LinearRule]]:
    """Return the rules to show: each one, look-aheads of 1, the delay and ``horizon``, and NAdam early and late."""

    def rule(name: str, **options: Any) -> LinearRule:
        return linear_rule(name, momentum=momentum, **options)

    horizons = sorted({1.0, float(delay)} | ({horizon} if horizon is not None else set()))
    shown = [(name, rule(name)) for name in ("sgd", "heavy-ball", "ema")]
    shown += [(name, rule(name, horizon=h)) for name in LOOKING_AHEAD for h in horizons]
    shown += [(f"nadam at update {t:,}", rule("nadam", update=t)) for t in NADAM_UPDATES]
    return shown


def steps_table(delay: int, momentum: float, horizon: float | None) -> Table:
    """Return each rule's largest stable and fastest step, and Proposition 1's cosine if gradients are noise alone."""
    table = Table(title=f"Gradients late by {delay} updates, momentum {momentum:g}: step size x curvature")
    table.add_column("Rule")
    for heading in ("Horizon", "Largest stable", "Without delay", "Fastest", "Updates to a tenth", "Cosine"):
        table.add_column(heading, justify="right")
    for name, rule in variants(delay, momentum, horizon):
        step, radius = fastest_step(rule, delay=delay)
        edges = [digits(max_stable_step(rule, delay=late)) for late in (delay, 0)]
        updates = math.log(10.0) / -math.log(radius)
        ahead = "" if math.isinf(rule.horizon) else f"{rule.horizon:.3g}"
        cosine = "" if rule.gamma == 0.0 else f"{noise_cosine(rule, delay):.2f}"
        table.add_row(name, ahead, *edges, digits(step), f"{updates:,.0f}", cosine)
    return table


def delays_table(delays: Sequence[Delay]) -> Table:
    """Return a table of SGD under each delay: in continuous time, and the edges update by update."""
    table = Table(title="SGD under fixed and random delays: step size x curvature")
    table.add_column("Delay", no_wrap=True)
    for heading in ("SDDE edge", "Fastest smooth", "Updates to a tenth", "Edge of the mean", "Edge of the mean square"):
        table.add_column(heading, justify="right")
    for delay in delays:
        fastest = fastest_rate(delay)
        updates = math.log(10.0) / damping(fastest, delay).decay
        sdde = [digits(stability_edge(delay)), digits(fastest), f"{updates:,.0f}"]
        table.add_row(delay.name, *sdde, *_discrete(delay))
    return table


def damping_table(delays: Sequence[Delay], step: float) -> Table:
    """Return a table of how SGD behaves under each delay at one step size times curvature."""
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


def lines(delay: int) -> list[str]:
    """Return the sentences below the tables."""
    return [
        "Horizon: updates that Nesterov's rule looks ahead, or the equivalent for another rule. Cosine: between "
        "look-ahead and displacement (Proposition 1) if gradients are noise alone.",
        f"Convex rate O(1/t) with gamma_t = (t - 2) / t: step size x smoothness of at most "
        f"{digits(safe_convex_step(1.0, delay))} (derived on a quadratic).",
    ]


def digits(value: float) -> str:
    """Format a number with three digits; "none" for infinity."""
    return "none" if math.isinf(value) else f"{value:.3g}"


def _discrete(delay: Delay) -> list[str]:
    if delay.probabilities is None:
        return ["", ""]
    mean = digits(max_stable_step("sgd", delay=delay))
    try:
        return [mean, digits(max_mean_square_step("sgd", delay=delay))]
    except ValueError:
        return [mean, "too long"]
