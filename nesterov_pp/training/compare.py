"""Comparison of several methods over several seeds: each run in its own process, the results in one table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from nesterov_pp.terminal import make_console, say
from nesterov_pp.training import checkpoint, plots, report, results
from nesterov_pp.training.config import FREE, Config, RunError, UserError, differs, flag, recorded_settings, settle
from nesterov_pp.training.data import read_text, tokenize
from nesterov_pp.training.folder import RunFolder, is_fresh, make_folder, read_object
from nesterov_pp.training.jobs import Job, run_all
from nesterov_pp.training.metrics import Curves, read_curves
from nesterov_pp.training.tokenizer import ByteTokenizer, check_text


def compare(
    given: Mapping[str, Any],
    methods: Sequence[str],
    seeds: Sequence[int],
    jobs: int,
    out: Path,
    *,
    rates: Sequence[float] = (),
    depths: Sequence[int] = (),
    resume: bool = False,
    planned_time: bool = False,
    every_rate: bool = False,
    console: Console | None = None,
) -> None:
    """Train every method with every seed, ``jobs`` at a time, each on one thread unless ``given`` has ``threads``.

    Every learning rate in ``rates`` and number of stages in ``depths`` is run, instead of ``given``'s. The first
    seed tries all rates; the others run only the best rate of each method, at which the method is judged. With
    ``every_rate``, all seeds try all rates, and the best is the one with the lowest mean. Several rates have a plot of
    their own, of the final losses.

    With ``planned_time``, the table and the plot also show the time that one device for each stage would take.

    Runs are stored in ``out/METHOD/seed-N``; with several rates or depths, in ``out/stages-P/lr-X/METHOD/seed-N``. With
    ``resume``, finished runs are used as they are and unfinished ones are resumed.

    Raises:
        UserError: a setting, the data or the folder is unusable; nothing has been started.
        RunError: some runs have failed; the table of the others has been written.
        InterruptionError: SIGINT or SIGTERM arrived; the runs have written checkpoints.
    """
    console = console or make_console()
    if given.get("data") is not None:
        given = {**given, "data": str(Path(given["data"]).resolve())}
    if not is_fresh(out) and not resume:
        raise UserError(f"{out} is not empty; add --resume to continue the comparison in it, or give another --out")
    every = _plan(given, methods, seeds, rates, depths, out)
    for job in every:
        job.config.check()
    _check_data(every[0].config)
    make_folder(out)
    tried = [job for job in every if every_rate or job.config.seed == seeds[0]]
    others = [job for job in every if job not in tried]
    count = len(tried) + len(others) // max(1, len(rates))
    finished = sum(job.finished for job in every)
    say(
        console,
        f"{len(methods)} methods, {len(seeds)} seeds: {count} runs of {every[0].config.microbatches} microbatches, "
        f"{jobs} at a time" + (f"; {finished} are already finished." if finished else "."),
    )
    failed = run_all(tried, lambda: _with_best_rates(tried, others), count, jobs, out, console)
    plan = [*tried, *_with_best_rates(tried, others)]
    reasons = [f"{job.name}: {reason}" for job, reason in failed]
    _report([job for job in plan if job.finished], out, console, reasons, planned_time, every_rate)
    if failed:
        raise RunError("; ".join(f"{job.name} failed ({reason})" for job, reason in failed))


def _check_data(config: Config) -> None:
    """Raise UserError if no run could train on the data."""
    text = read_text(config.data, whole_characters=config.tokenizer == "bpe")
    tokenize(text, ByteTokenizer(), config.context)
    if config.tokenizer == "bpe":
        check_text(text.train + text.validation)


def _plan(
    given: Mapping[str, Any],
    methods: Sequence[str],
    seeds: Sequence[int],
    rates: Sequence[float],
    depths: Sequence[int],
    out: Path,
) -> list[Job]:
    """Return all runs, one seed after the other, so that every method has a run before any has its second."""
    grid = [
        ({"lr": rate} if rates else {}) | ({"stages": depth} if depths else {})
        for depth in depths or (None,)
        for rate in rates or (None,)
    ]
    several = (len(rates) > 1, len(depths) > 1)
    return [
        _job({**given, **point, "method": m, "seed": s}, out, *several)
        for s in seeds
        for point in grid
        for m in methods
    ]


def _job(given: Mapping[str, Any], out: Path, several_rates: bool, several_depths: bool) -> Job:
    """Return the job of one run; raise UserError if its folder holds a run with other settings."""
    config = Config(**given)
    if several_depths:
        out /= f"stages-{config.stages}"
    if several_rates:
        out /= f"lr-{config.lr:g}"
    folder = RunFolder(out / config.method / f"seed-{config.seed}")
    if folder.config.exists():
        there = settle({}, recorded_settings(read_object(folder.config), folder.config))
        for name, value in vars(config).items():
            if name not in FREE and getattr(there, name) != value:
                raise UserError(f"{folder.path}: {differs(flag(name), getattr(there, name), value)}")
    return Job(config, folder, several_rates, several_depths)


def _with_best_rates(tried: Sequence[Job], others: Sequence[Job]) -> list[Job]:
    """Return the jobs in ``others`` that use the learning rate with which their method did best in ``tried``."""
    best = {}
    for depth in {job.config.stages for job in tried}:
        rows, _ = _judged([job for job in tried if job.finished and job.config.stages == depth], every_rate=False)
        best.update({(row["method"], depth): row["lr"] for row in rows})
    return [job for job in others if best.get((job.config.method, job.config.stages)) == job.config.lr]


def _report(
    finished: Sequence[Job], out: Path, console: Console, failed: Sequence[str], planned_time: bool, every_rate: bool
) -> None:
    depths = sorted({job.config.stages for job in finished})
    pictures = ["compare.png"]
    by_depth, means, sentences = {}, {}, []
    for depth in depths:
        end = f"-{depth}-stages" if len(depths) > 1 else ""
        of_depth = [job for job in finished if job.config.stages == depth]
        rows, curves = _judged(of_depth, every_rate)
        seconds = _planned(of_depth[0].config, [row["method"] for row in rows]) if planned_time else {}
        rows = [results.with_planned_time(row, seconds, of_depth[0].config.microbatches) for row in rows]
        checkpoint.write_atomic(out / f"compare{end}.png", partial(_draw, curves, seconds))
        if any(len(row["by_lr"]) > 1 for row in rows):
            pictures.append(f"compare-rates{end}.png")
            checkpoint.write_atomic(out / pictures[-1], partial(_draw_rates, rows))
        sentence = " ".join([results.sentence(rows), *results.edges(rows)]).strip()
        checkpoint.write_text(out / f"compare{end}.md", results.markdown(rows, sentence))
        console.print(results.table(rows, f"{depth} stages" if end else "Comparison"))
        by_depth[depth], means[depth] = rows, {m: results.mean_curve(c) for m, c in curves.items()}
        sentences += [sentence] if sentence else []
    if not depths:
        return
    if len(depths) > 1:
        by_depth = results.relate_depths(by_depth, means)
        checkpoint.write_text(out / "compare.md", results.depth_markdown(by_depth))
        checkpoint.write_atomic(out / "compare.png", lambda file: plots.draw_depths(file, by_depth))
    rows = [row for rows in by_depth.values() for row in rows]
    result = {"methods": rows, "comparison": " ".join(sentences), "failed": list(failed)}
    checkpoint.write_text(out / "compare.json", json.dumps(result, indent=2) + "\n")
    for sentence in sentences:
        say(console, sentence)
    files = ", ".join(["compare.md", "compare.json", *pictures])
    say(console, f"The table and the plots are in {out}: {files}.")


def _planned(config: Config, methods: Sequence[str]) -> dict[str, float]:
    from nesterov_pp.training.pace import MODEL, STORAGE, seconds_per_microbatch

    settings = {name: getattr(config, name) for name in MODEL}
    if config.tokenizer == "bytes":
        settings["vocab_size"] = ByteTokenizer.size
    storage = {name: getattr(config, name) for name in STORAGE}
    return seconds_per_microbatch(settings, methods, config.stages, **storage)


def _draw(curves: dict[str, list[Curves]], seconds: Mapping[str, float], file: IO[bytes]) -> None:
    plots.draw_comparison(file, curves, seconds)


def _draw_rates(rows: Sequence[Mapping[str, Any]], file: IO[bytes]) -> None:
    plots.draw_rates(file, rows)


def _judged(jobs: Sequence[Job], every_rate: bool) -> tuple[list[dict[str, Any]], dict[str, list[Curves]]]:
    """Return a row for each method at its best learning rate and the curves of its runs, in the order of the runs."""
    runs: dict[tuple[str, float], list[Job]] = {}
    for job in jobs:
        runs.setdefault((job.config.method, job.config.lr), []).append(job)
    rows = [
        {
            **results.summarise([report.read_summary(job.folder.summary) for job in of_point]),
            "stages": of_point[0].config.stages,
            "lr": of_point[0].config.lr,
        }
        for of_point in runs.values()
    ]
    best = results.best_rates(rows, every_seed=every_rate)
    curves = {
        row["method"]: [read_curves(job.folder.metrics) for job in runs[row["method"], row["lr"]]] for row in best
    }
    return results.relate(best, {m: results.mean_curve(c) for m, c in curves.items()}), curves
