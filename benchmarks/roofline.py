"""Measure how close each step comes to the memory bandwidth: ``python -m benchmarks.roofline --help``.

The bytes that a step must move (each input read once, each output written once) over its time are compared with a copy
of as many bytes in the same round. On a GPU the device time is measured while the host is ahead, as it is in training,
and the host time is measured by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

import nesterov_pp as npp
from benchmarks import workloads as w
from benchmarks.gpu_check import driver, write_json
from benchmarks.plain import NoCompilerError
from benchmarks.rows import DEVICE_BACKENDS, WORKLOADS, Problem, Row, our_rows, peers
from benchmarks.step import machine

FLOAT, HALF = torch.float32, torch.bfloat16
OPERATIONS = 20  # in csrc/update.h, per parameter
COPY = "copy"
UNMEASURED = 3
COPIED_AT_ONCE = 4 * 2**30  # bytes
COMPILED_AT_MOST = 300  # tensors: compiling for more takes minutes, and so does profiling thousands of launches
CYCLES = 2e9  # clock cycles of a GPU per second, at most
LONGEST_WAIT = 0.25  # seconds that the device is kept busy, at most
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchCooperative", "cuLaunchKernel", "cuLaunchCooperative", "cudaGraphLaunch")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v")


# ---------------------------------------------------------------------- measuring


class Clock(Protocol):
    def time(self, step: w.Step) -> tuple[float, float]:
        """Return the seconds that one step takes on the device, and on the host."""

    def launches(self, step: w.Step) -> int | None:
        """Return the number of kernels that one step launches; None if there are none to count."""


class HostClock:
    def time(self, step: w.Step) -> tuple[float, float]:
        w.prepare(step)
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        return seconds, seconds

    def launches(self, step: w.Step) -> int | None:
        return None


class CudaClock:
    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def time(self, step: w.Step) -> tuple[float, float]:
        w.prepare(step)
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        host = time.perf_counter() - start
        w.prepare(step)
        torch.cuda.synchronize()
        # The device waits until the host has launched everything, so that no gap in its work is the host's.
        torch.cuda._sleep(int(CYCLES * min(LONGEST_WAIT, 1.5 * host + 5e-5)))  # type: ignore[no-untyped-call]
        self._begin.record()
        step()
        self._end.record()
        torch.cuda.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3, host

    def launches(self, step: w.Step) -> int | None:
        kinds = torch.profiler.ProfilerActivity
        w.prepare(step)
        try:
            with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
                step()
                torch.cuda.synchronize()
        except RuntimeError:  # some machines do not allow profiling
            return None
        return sum(event.count for event in profile.key_averages() if event.key.startswith(LAUNCHES)) or None


def copy_step(problem: Problem) -> tuple[w.Step, int]:
    """Return a copy of as many bytes as a step moves, and that number. On a CPU the copy is the plain loop.

    Many bytes are copied in several parts, from and to the same memory, which is far larger than any cache.
    """
    if problem.device.type == "cpu":
        with contextlib.suppress(NoCompilerError):
            return w.plain_loop(problem), 28 * problem.elements
    parts = -(-14 * problem.elements // COPIED_AT_ONCE)
    source = torch.empty(14 * problem.elements // (4 * parts) + 1, device=problem.device).normal_()
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(parts):
            target.copy_(source)

    return copy, 2 * parts * source.nbytes


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 2**33


def groups(rows: list[Row], elements: int, budget: float) -> Iterator[list[Row]]:
    """Yield the rows that are held in memory and measured together; compiled rows come last, each alone."""
    group: list[Row] = []
    for row in sorted(rows, key=lambda row: row.compiled):
        full = sum(r.held for r in [*group, row]) * elements > budget
        if group and (full or row.compiled):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


Samples = dict[str, list[tuple[float, float]]]


def measure(steps: dict[str, w.Step], clock: Clock, rounds: int, failed: dict[str, str]) -> Samples:
    """Return samples of every step, taken in turn after unmeasured rounds; leave out a step once it has failed."""
    samples: Samples = {name: [] for name in steps}
    for r in range(rounds + UNMEASURED):
        for name in list(samples):
            try:
                sample = clock.time(steps[name])
            except Exception as error:
                failed[name] = reason(error)
                del samples[name], steps[name]
                continue
            if r >= UNMEASURED:
                samples[name].append(sample)
    return samples


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:240]


def quartiles(values: Iterable[float]) -> list[float]:
    return [float(f"{q:.5g}") for q in statistics.quantiles(values, n=4, method="inclusive")]


def measured(row: Row, elements: int, samples: Samples, anchor: str, copied: int) -> dict[str, Any]:
    """Return the figures of a row; its ratios to the copy and to our first row are those of single rounds."""
    seconds = [device for device, _ in samples[row.name]]
    copies = [device for device, _ in samples[COPY]]
    step = row.bytes * elements
    rates = [step / s / (copied / c) for s, c in zip(seconds, copies, strict=True)]
    first = samples.get(anchor)
    ratios = [s / a for s, (a, _) in zip(seconds, first, strict=True)] if first else None
    return {
        "name": row.name,
        "ours": row.ours,
        "bytes_per_parameter": row.bytes,
        "quartiles_ms": quartiles(s * 1e3 for s in seconds),
        "gb_per_s": round(step / statistics.median(seconds) / 1e9, 2),
        "copy_gb_per_s": round(copied / statistics.median(copies) / 1e9, 2),
        "of_copy": quartiles(rates),
        "times_ours": quartiles(ratios) if ratios else None,
        "host_us": quartiles(host * 1e6 for _, host in samples[row.name]),
        "samples_ms": [[round(t * 1e3, 5) for t in sample] for sample in samples[row.name]],
    }


def run(
    workload: str, device: torch.device, rounds: int, wanted: Callable[[Row], bool], save: Callable[[Any], None]
) -> dict[str, Any]:
    """Measure the wanted rows on one list of tensors; after each group, pass the results so far to ``save``."""
    shapes = WORKLOADS[workload]()
    clock: Clock = CudaClock() if device.type == "cuda" else HostClock()
    problems = {dtype: Problem(shapes, dtype, device) for dtype in (FLOAT, HALF)}
    elements = problems[FLOAT].elements
    found: dict[str, Any] = {"workload": workload, "tensors": len(shapes), "parameters": elements, "rows": []}
    missing: dict[str, str] = {}
    found["missing"] = missing
    rows: list[Row] = []
    for backend in DEVICE_BACKENDS[device.type]:
        unavailable = npp.kernels.available_backends()[backend]
        if unavailable is None:
            rows += our_rows(backend)
        else:
            missing[f"nesterov_pp.NAdam, {backend}"] = unavailable
    anchor = rows[0]
    rows = [row for row in [*rows, *peers()] if wanted(row)]
    if len(shapes) > COMPILED_AT_MOST:
        missing |= {row.name: f"compiling for {len(shapes):,} tensors takes minutes" for row in rows if row.compiled}
    # Besides the rows of a group: the copy, our first row, and room for the temporaries of foreach.
    budget = 0.9 * free_bytes(device) - 2 * COPIED_AT_ONCE - (anchor.held + 16) * elements
    for group in groups([row for row in rows if row.name not in missing], elements, budget):
        step, copied = copy_step(problems[FLOAT])
        steps: dict[str, w.Step] = {COPY: step}
        for row in dict.fromkeys([anchor, *group]):
            try:
                steps[row.name] = row.build(problems[row.dtype])
            except Exception as error:
                missing[row.name] = reason(error)
        samples = measure(steps, clock, rounds, missing)
        for row in group:
            if row.name in samples:
                entry = measured(row, elements, samples, anchor.name, copied)
                counted = row.ours or len(shapes) <= COMPILED_AT_MOST
                launches = clock.launches(steps[row.name]) if counted else None
                found["rows"].append({**entry, "launches": launches})
        save(found)
        del step, steps
        torch.compiler.reset()  # compiled steps keep their tensors alive
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    found["failed"] = [row.name for row in rows if row.ours and row.name in missing]
    save(found)
    return found


# ---------------------------------------------------------------------- showing


def table(found: dict[str, Any], conditions: str) -> str:
    lines = [
        f"{found['workload']}: {found['tensors']:,} tensors, {found['parameters'] / 1e6:.1f}M parameters, {conditions}",
        "",
        "| step | B/parameter | median ms (quartiles) | GB/s | of the copy | time / ours | host us | launches |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found["rows"]:
        low, median, high = row["quartiles_ms"]
        few, share, many = row["of_copy"]
        times = f"{row['times_ours'][1]:.3f}" if row["times_ours"] else "-"
        lines.append(
            f"| {row['name']} | {row['bytes_per_parameter']} | {median:.4g} ({low:.4g} to {high:.4g}) "
            f"| {row['gb_per_s']:.1f} | {share:.3f} ({few:.3f} to {many:.3f}) | {times} "
            f"| {row['host_us'][1]:.0f} | {row['launches'] or '-'} |"
        )
    missing = [f"Not measured: {name}: {why}" for name, why in found["missing"].items()]
    return "\n".join([*lines, *([""] if missing else []), *missing])


def draw(workloads: list[dict[str, Any]], path: Path) -> str:
    """Draw operations per second over operations per byte, under the roof set by the copy.

    Returns:
        the line to print about the picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "The picture is left out: matplotlib is not installed."
    figure = Figure(figsize=(5.0 * len(workloads) + 4.0, 5.0), dpi=150, layout="constrained")
    (all_axes,) = figure.subplots(1, len(workloads), sharey=True, squeeze=False)
    names = list(dict.fromkeys(row["name"] for found in workloads for row in found["rows"]))
    for axes, found in zip(all_axes, workloads, strict=True):
        for row in found["rows"]:
            k = names.index(row["name"])
            intensity = OPERATIONS / row["bytes_per_parameter"]
            axes.loglog(
                intensity,
                intensity * row["gb_per_s"],
                MARKERS[k % len(MARKERS)],
                color=COLOURS[k % len(COLOURS)],
                fillstyle="full" if row["ours"] else "none",
                label=row["name"],
            )
        copy = statistics.median(row["copy_gb_per_s"] for row in found["rows"])
        axes.loglog([0.4, 2.0], [0.4 * copy, 2.0 * copy], "k-", label="the copy")
        axes.set(title=f"{found['workload']}: the copy moves {copy:,.0f} GB/s")
        axes.set(xlabel="operations per byte that must be moved", ylabel="10^9 operations per second")
        axes.grid(color="0.9", which="both")
    handles = {label: h for axes in all_axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return f"Picture: {path}"


def conditions(device: torch.device) -> dict[str, Any]:
    """Return the machine and software that a result was measured with."""
    found = {**machine(), "device": "cpu", "driver": "-", "cuda": torch.version.cuda}
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "driver": driver()}
        with contextlib.suppress(ImportError):
            found["triton"] = importlib.import_module("triton").__version__
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument(
        "--workload",
        nargs="+",
        choices=list(WORKLOADS),
        default=["gpt2-small"],
        metavar="NAME",
        help=f"lists of tensors, of {', '.join(WORKLOADS)} (default: gpt2-small)",
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to measure on (default: cuda if torch finds a GPU, else cpu)",
    )
    parser.add_argument("--rounds", type=int, default=20, help="measured steps of each row (default: %(default)s)")
    parser.add_argument(
        "--rows", default="", metavar="PATTERN", help="measure only rows whose name matches (default: all)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out the steps under torch.compile")
    parser.add_argument("--json", type=Path, help="also write the rows and every sample to this file (default: none)")
    parser.add_argument("--png", type=Path, help="also draw the roofline to this file (default: none)")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2 for quartiles, not {options.rounds}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a GPU, but torch finds none.", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    report: dict[str, Any] = {**conditions(device), "rounds": options.rounds}
    done: list[dict[str, Any]] = []

    def wanted(row: Row) -> bool:
        return re.search(options.rows, row.name) is not None and not (row.compiled and options.no_compile)

    def save(found: dict[str, Any]) -> None:
        if options.json:
            write_json(options.json, {**report, "workloads": [*done, found]})

    picture = ""
    shown = f"float32 unless said otherwise, {report['device']}, torch {report['torch']}"
    for workload in options.workload:
        found = run(workload, device, options.rounds, wanted, save)
        done.append(found)
        print(f"{table(found, shown)}\n", flush=True)
        if options.png:
            picture = draw(done, options.png) + "\n"  # after each list, since the next one may take too long
    count, missing = sum(len(found["rows"]) for found in done), sum(len(found["missing"]) for found in done)
    print(f"{picture}measured {count} rows, {missing} not measured")
    return 1 if any(found["failed"] for found in done) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
