"""The command ``python -m nesterov_pp plan``: its arguments, and the table it prints."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from nesterov_pp.methods.costs import of_step
from nesterov_pp.pipeline.delay_models import stage_delays
from nesterov_pp.pipeline.wire import check_wire, message_bytes
from nesterov_pp.planning.layers import stage_costs
from nesterov_pp.planning.memory import memory_per_stage
from nesterov_pp.planning.simulate import SCHEDULES, Network, least_slack, simulate
from nesterov_pp.planning.swarm import SimulatedSwarm, Speeds, best_rate, long_enough, simulate_swarm, swarm_table

if TYPE_CHECKING:
    from rich.console import Console

    from nesterov_pp.pipeline.recipe import Recipe
    from nesterov_pp.planning.layers import LayerCost
    from nesterov_pp.stash import OldVersions
    from nesterov_pp.terminal import Table

Typed = Callable[[Callable[[str], Any]], Callable[[str], Any]]
_GIB = float(1 << 30)
_LARGEST = 1e12
_WORKERS, _REJOIN_SECONDS, _IN_FLIGHT = 4, 60.0, 2.0
_MOST = 10_000  # devices, or microbatches per update: more take minutes to simulate


def add_arguments(parser: argparse.ArgumentParser, typed: Typed) -> None:
    """Add the flags of ``plan``. ``typed`` makes an argument type of a function that raises ``ValueError``."""

    def add(name: str, parse: Callable[[str], Any], metavar: str, help_text: str) -> None:
        parser.add_argument(name, type=typed(parse), metavar=metavar, help=help_text)

    add("--method", str, "X", "method whose optimizer steps, in every schedule (default: nesterov)")
    add("--devices", _counts, "P[,...]", "numbers of stages to compare, with one device per stage (default: 2,4,8)")
    add(
        "--per-update",
        _count,
        "N",
        "microbatches per update of gpipe and 1f1b (default: 4, or those of a method that waits)",
    )
    add(
        "--slack",
        _slack,
        "N",
        "further microbatches in flight, in async (default: none, and as many as hide the links)",
    )
    add("--wire", _wire, "X", "format of messages, bfloat16 or int8 (default: that of the weights)")
    add("--latency", _at_least_0, "MS", "latency of a link between neighbours, in milliseconds (default: 0)")
    add("--bandwidth", _above_0, "GBIT", "bandwidth of a link, in Gbit/s; 0.08 is 80 Mbit/s (default: unlimited)")
    add("--speed", _above_0, "X", "speed of a device, as a multiple of this machine's speed (default: 1)")
    add("--memory", _above_0, "GIB", "memory of a device, in GiB; what does not fit is marked (default: unlimited)")
    what = "simulate a swarm, with several workers a stage that may fail, instead of pipelines"
    parser.add_argument("--swarm", action="store_true", help=what)
    add("--workers", _count, "N", "with --swarm: workers of each stage, each with one device (default: 4)")
    what = "with --swarm: their speeds, as multiples of --speed: a list, in turn, or a range, as 0.5..2 (default: 1)"
    add("--speeds", _speeds, "X[,...]", what)
    add("--failures", _above_0, "HOURS", "with --swarm: mean time until a worker fails, in hours (default: never)")
    add("--rejoin", _at_least_0, "S", "with --swarm: seconds until a worker that failed is back (default: 60)")
    add("--in-flight", _between(0.01, 100), "N", "with --swarm: microbatches in flight for each worker (default: 2)")
    what = "with --swarm: standard deviation of the times of forwards and backwards over their means (default: 0)"
    add("--variation", _between(0, 10), "X", what)


def plan(
    console: Console,
    model: dict[str, Any],
    *,
    method: str = "nesterov",
    devices: Sequence[int] = (2, 4, 8),
    per_update: int | None = None,
    slack: int | None = None,
    wire: str | None = None,
    latency: float = 0.0,
    bandwidth: float = math.inf,
    speed: float = 1.0,
    memory: float = math.inf,
    swarm: bool = False,
    workers: int | None = None,
    speeds: Speeds | None = None,
    failures: float | None = None,
    rejoin: float | None = None,
    in_flight: float | None = None,
    variation: float | None = None,
    **storage: Any,
) -> None:
    """Measure the layers of ``train``'s model on this machine, and print estimates for pipelines or swarms of them.

    ``storage`` are the settings ``weights_dtype``, ``state_dtype``, ``master_weights`` and ``stash`` of ``Config``.
    The asynchronous pipeline updates as often, and as late, as the method does; if the method waits for its gradients,
    after every microbatch. Without ``slack``, that of ``least_slack`` has a row of its own where links need one.

    Raises:
        UserError: the settings of the model contradict each other.
        ValueError: there are more devices than layers, the method is unknown or not a single optimizer, or arguments
            of pipelines and swarms are mixed.
    """
    from nesterov_pp.terminal import say
    from nesterov_pp.training.config import Config
    from nesterov_pp.training.pace import MODEL, measure_model

    of_pipelines = {
        "per-update": per_update,
        "slack": slack,
        "wire": wire,
        "memory": memory if memory < math.inf else None,
    }
    of_swarms = {
        "workers": workers,
        "speeds": speeds,
        "failures": failures,
        "rejoin": rejoin,
        "in-flight": in_flight,
        "variation": variation,
    }
    if wrong := [name for name, value in (of_pipelines if swarm else of_swarms).items() if value is not None]:
        name = wrong[0]
        raise ValueError(f"plan --swarm has no --{name}" if swarm else f"--{name} needs --swarm")
    Config(stages=1, **model).check()
    settings = {name: model.get(name, getattr(Config, name)) for name in MODEL}
    if max(devices) > settings["layers"]:
        raise ValueError(f"{settings['layers']} layers cannot be cut into {max(devices)} stages; give more --layers")
    config = Config(method=method, slack=slack or 0, **storage)
    config.check_optimizer()
    recipe, weights = config.own_recipe, config.dtype
    cost = of_step(recipe, weights)
    if cost is None:
        raise ValueError(f"plan cannot count {method}, whose step is neither a single pass nor a rotated one")
    layers, stash = measure_model(settings, recipe, weights), recipe.linearise_at == "version"
    layers = [replace(cost, message_bytes=message_bytes(cost.message_bytes, weights, wire)) for cost in layers]
    network = Network(latency / 1e3, bandwidth * 1e9 / 8)
    tokens = settings["batch"] * settings["context"]
    if swarm:
        state = cost.state / weights.itemsize
        often = 3600 * (failures or math.inf)
        team = speeds or Speeds()
        back = _REJOIN_SECONDS if rejoin is None else rejoin
        size, flight, vary = workers or _WORKERS, in_flight or _IN_FLIGHT, variation or 0.0
        swarms = _swarms(layers, recipe, state, devices, speed, network, size, team, often, back, flight, vary)
        console.print(swarm_table(swarms, tokens))
        return
    waiting = per_update or (4 if recipe.delayed else recipe.accumulation(1))
    rows = []
    for count in devices:
        costs = stage_costs(layers, count, speed)
        often = recipe.accumulation(count) if recipe.delayed else 1
        slacks = [recipe.slack]
        if slack is None and not recipe.slack and recipe.takes_slack:
            slacks += [n for n in [least_slack(costs, network, often, stash=stash)] if n]
        for schedule, n in [("async", n) for n in slacks] + [(schedule, 0) for schedule in SCHEDULES[1:]]:
            k, delays = waiting, [0] * count
            if schedule == "async":
                k, of_method = often, replace(recipe, slack=n)
                delays = of_method.delays_of(count, k).largest if recipe.delayed else stage_delays(count)
            run = max(4 * (count + n), 32) * math.lcm(often, waiting)
            found = simulate(schedule, costs, network, run, k, delays, slack=n, stash=stash)
            state = cost.state / weights.itemsize
            held = max(
                memory_per_stage(
                    schedule,
                    costs,
                    k,
                    stash=stash,
                    old_versions=cast("OldVersions", config.stash),
                    buffer=recipe.decodes_whole_versions,
                    itemsize=weights.itemsize,
                    state=state,
                    delays=delays,
                    slack=n,
                )
            )
            rows.append((count, f"{schedule} --slack {n}" if n else schedule, found, held, delays))
    console.print(_table(rows, tokens, memory * _GIB, waiting))
    fitting = [row for row in rows if row[3] <= memory * _GIB]
    if not fitting:
        say(console, "Nothing fits: use more stages, recomputation, or a method without a stash (nesterov-no-stash).")
        return
    count, schedule, found, held, delays = min(fitting, key=lambda row: row[2].seconds_per_microbatch)
    lateness = f"; gradients {delays[0]} updates late on the first stage" if delays[0] else ""
    speed_found = f"{tokens / found.seconds_per_microbatch:,.0f} tokens/s"
    name, *more = schedule.split(" ", 1)
    with_slack = "".join(f" and {flag}" for flag in more)
    say(console, f"Fastest that fits: {name} with {count} stages{with_slack}, {speed_found}{lateness}.")


def _swarms(
    layers: Sequence[LayerCost],
    recipe: Recipe,
    state: float,
    devices: Sequence[int],
    speed: float,
    network: Network,
    workers: int,
    speeds: Speeds,
    failure_seconds: float,
    rejoin_seconds: float,
    in_flight: float,
    variation: float,
) -> list[tuple[int, int, SimulatedSwarm]]:
    """Return the rows of ``swarm_table``. ``state`` is the optimizer's, as a multiple of the weights."""
    from nesterov_pp.swarm.task import Task, check_recipe

    if workers * max(devices) > _MOST:
        raise ValueError(f"{max(devices)} stages of {workers} workers are more than the {_MOST} that are simulated")
    rows = []
    for count in devices:
        check_recipe(recipe, count)
        costs = stage_costs(layers, count, speed)
        versions = Task.versions if recipe.linearise_at == "version" else 1
        team = speeds.of(count, workers)
        run = long_enough(best_rate(costs, team), count, count * workers, failure_seconds, in_flight)
        found = simulate_swarm(
            costs,
            team,
            network,
            run,
            failure_seconds=failure_seconds,
            rejoin_seconds=rejoin_seconds,
            state_bytes=[c.weight_bytes * (versions + state) for c in costs],
            in_flight=in_flight,
            variation=variation,
        )
        rows.append((count, workers, found))
    return rows


def _table(rows: Sequence[tuple[int, str, Any, int, list[int]]], tokens: int, limit: float, per_update: int) -> Table:
    from nesterov_pp.terminal import Table

    table = Table(title=f"Simulated pipelines; gpipe and 1f1b update every {per_update} microbatches")
    for heading in ("Stages", "Schedule", "Busy", "ms/microbatch", "us/token", "Tokens/s", "Largest stage", "Delay"):
        table.add_column(heading, justify="left" if heading == "Schedule" else "right")
    for count, schedule, found, held, delays in rows:
        seconds = found.seconds_per_microbatch
        table.add_row(
            str(count),
            schedule,
            f"{found.utilisation:.1%}",
            f"{1e3 * seconds:.3g}",
            f"{1e6 * seconds / tokens:.3g}",
            f"{tokens / seconds:,.0f}",
            _size(held) + ("" if held <= limit else " (too large)"),
            str(delays[0]),
            end_section=schedule == SCHEDULES[-1],
        )
    return table


def _size(count: int) -> str:
    return f"{count / _GIB:.3g} GiB" if count >= _GIB else f"{count / 2**20:.3g} MiB"


def _count(text: str) -> int:
    from nesterov_pp.training.config import whole

    return whole(1, _MOST)(text)


def _slack(text: str) -> int:
    from nesterov_pp.training.config import whole

    return whole(0, _MOST)(text)


def _wire(text: str) -> str:
    check_wire(text)
    return text


def _counts(text: str) -> list[int]:
    return [_count(part.strip()) for part in text.split(",")]


def _between(least: float, most: float) -> Callable[[str], float]:
    def parsed(text: str) -> float:
        if not least <= _number(text) <= most:
            raise ValueError(f"needs a number from {least:g} to {most:g}, not {text!r}")
        return _number(text)

    return parsed


def _speeds(text: str) -> Speeds:
    least, drawn, most = text.partition("..")
    if not drawn:
        return Speeds(tuple(_above_0(part.strip()) for part in text.split(",")))
    if _above_0(least) > _above_0(most):
        raise ValueError(f"needs a range from the least to the largest speed, not {text!r}")
    return Speeds((_above_0(least), _above_0(most)), drawn=True)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"needs a number, not {text!r}")
    if value and not 1.0 / _LARGEST <= abs(value) <= _LARGEST:
        raise ValueError(f"needs a number from {1.0 / _LARGEST:g} to {_LARGEST:g}, not {text!r}")
    return value


def _at_least_0(text: str) -> float:
    if _number(text) < 0:
        raise ValueError(f"needs a number of at least 0, not {text!r}")
    return _number(text)


def _above_0(text: str) -> float:
    if _number(text) <= 0:
        raise ValueError(f"needs a number above 0, not {text!r}")
    return _number(text)
