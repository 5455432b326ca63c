"""Build, test, measure and check the kernels on a machine with a GPU: ``python -m benchmarks.gpu_check``.

This needs no network and no virtual environment: everything runs in the Python that starts it. The results go into
``gpu-check.json``, which is rewritten after each part, so that nothing is lost if the run is stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 510.0  # for all parts; with everything around them, a run ends within nine minutes
GRACE = 5.0  # seconds after the time limit to report the results so far
TAIL = 20_000  # characters of a part's output that are kept
SHOWN = 3_000  # characters of the kept output that are printed
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
DEVICE_TESTS = ("tests/device", "tests/triton")
NUMERICAL_TESTS = ("tests/kernels", "tests/optim", "tests/stash")
NEEDED = {
    "rich": ("tests/test_cli.py", "tests/training", "tests/planning/test_command.py", "tests/analysis/test_command.py"),
    "scipy": ("tests/analysis/test_sdde.py", "tests/analysis/test_random_delays.py"),
}
"""The packages that test files need without importing them: the commands print with rich."""
BACKENDS = """
from nesterov_pp.kernels import available_backends
found = available_backends()
print("; ".join(f"{name}: {reason or 'available'}" for name, reason in found.items()))
raise SystemExit(found["cuda"] is not None or found["triton"] is not None)
"""
PROBE = """
import json, torch
there = torch.cuda.is_available()
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name() if there else None}
try:
    import triton
    found["triton"] = triton.__version__
except ImportError as error:
    found["triton"] = f"none: {error}"
print(json.dumps(found))
"""
CHECKS = ("memcheck", "racecheck", "initcheck")  # of compute-sanitizer
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__grid_size",
    "launch__block_size",
)


@dataclass(frozen=True)
class Part:
    """One command to run.

    ``headline`` is a regular expression: the last line of the output that matches is shown, and a part that exits with
    status 0 but without such a line has failed. ``result`` is a JSON file that the part writes.
    """

    name: str
    command: tuple[str, ...]
    limit: float  # seconds
    tool: str = ""  # a program that the part needs; if it is not installed, the part is not run
    headline: str = ""
    result: Path | None = None


@dataclass(frozen=True)
class Outcome:
    name: str
    outcome: str
    seconds: float = 0.0
    line: str = ""
    tail: str = ""


@dataclass
class Report:
    """The results so far; ``write`` replaces the whole file."""

    path: Path
    facts: dict[str, Any]
    waiting: list[str]
    parts: list[Outcome] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        parts = [asdict(outcome) for outcome in self.parts]
        write_json(self.path, {**self.facts, "parts": parts, "waiting": self.waiting, "measured": self.measured})


def write_json(path: Path, found: object) -> None:
    """Write a JSON file, which replaces the old one when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(found, indent=1) + "\n")
    unfinished.replace(path)


# ---------------------------------------------------------------------- the parts


def parts(out: Path) -> list[Part]:
    """Return the parts, the most important first, in case the time does not suffice."""
    python = sys.executable
    left_out = ("--ignore", *DEVICE_TESTS, *unimportable())
    side_by_side = (python, "-m", "benchmarks.side_by_side")
    pytest = ("-q", "--tb=short", "-p", "no:cacheprovider")
    step = (python, "-m", "benchmarks.profile_step", "--device", "cuda", "--backend", "all", "--clip", "1.0")
    counters = ("ncu", "--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all")
    metrics = ("--launch-count", "40", "--metrics", ",".join(METRICS))

    def tests(name: str, paths: Sequence[str], limit: float, *options: str) -> Part:
        command = (*side_by_side, *paths, "--", *pytest, *options)
        return Part(name, command, limit, headline=r"\d+ (passed|failed|error)")

    def roofline(name: str, limit: float, *options: str) -> Part:
        result = out / f"gpu-{name}.json"
        command = (python, "-m", "benchmarks.roofline", "--device", "cuda", "--json", str(result), *options)
        return Part(name, command, limit, headline="^measured", result=result)

    def sanitizer(check: str, note: str = "", *options: str) -> Part:
        # torch's memory pool would hide accesses outside of a tensor.
        tool = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--target-processes", "all")
        short = (*step, "--workload", "short", "--steps", "2", "--ring", "3", *options)
        command = (*tool, "--tool", check, "--error-exitcode", "1", *short)
        return Part(check + note, command, 100, tool="compute-sanitizer", headline="SUMMARY: 0 ")

    eight_bit = ("-8bit", "--dtype", "bfloat16", "--state-dtype", "8bit", "--master-weights", "24bit")
    large, small = ("gpt2-small", "one", "1b"), ("tiny", "tiny-in-one", "odd")
    fused = ("--rows", "cuda|triton|torch")  # the reference takes long and is no peer
    picture = ("--png", str(out / "gpu-roofline.png"))
    return [
        Part("build", (python, "setup.py", "build_ext", "--inplace"), 170),
        Part("backends", (python, "-c", BACKENDS), 30, headline="available"),
        tests("device-tests", DEVICE_TESTS, 150),
        tests("numerical-tests", [*NUMERICAL_TESTS, *left_out], 130, "-k", "cuda or triton"),
        roofline("roofline", 120, "--no-compile", *fused, "--workload", *large, *picture),
        roofline("microbenchmarks", 100, "--no-compile", *fused, "--workload", *small),
        *(sanitizer(check, *options) for check in CHECKS for options in ((), eight_bit)),
        Part("ncu", (*counters, *metrics, *step, "--steps", "1"), 60, tool="ncu", headline="gpu__time_duration"),
        # A part of its own, since compiling may take longer than everything else.
        roofline("compiled", 150, "--rows", "compile", "--workload", "gpt2-small", "1b"),
        tests("tests", ["tests", *left_out], 200),
    ]


def unimportable(root: Path = ROOT) -> dict[str, str]:
    """Return the test files and folders that need a missing package, with its name; pytest would stop at them."""
    files = sorted((root / "tests").rglob("*.py"))
    own = {f.stem for f in files} | {"benchmarks", "nesterov_pp", "setup"}
    found = {path: name for name, paths in NEEDED.items() for path in paths if importlib.util.find_spec(name) is None}
    try:
        importlib.metadata.version("nesterov-pp")
    except importlib.metadata.PackageNotFoundError:
        found["tests/packaging/test_metadata.py"] = "nesterov-pp"
    for file in files:
        names = re.findall(r"^(?:from|import) ([A-Za-z_]\w*)", file.read_text(), re.MULTILINE)
        missing = [name for name in names if name not in own and importlib.util.find_spec(name) is None]
        if missing and file.name.startswith("test_"):
            found[str(file.relative_to(root))] = missing[0]
    return found


# ---------------------------------------------------------------------- running one


def run_part(part: Part, left: float, environment: Mapping[str, str]) -> Outcome:
    """Run a part for at most ``left`` seconds, in a process group of its own that is killed afterwards."""
    if part.tool and shutil.which(part.tool, path=environment.get("PATH")) is None:
        return Outcome(part.name, NOT_RUN, line=f"not run: {part.tool} is not installed")
    if left < part.limit / 4:  # too little: it would be killed
        return Outcome(part.name, NOT_RUN, line="not run: no time left")
    limit = min(part.limit, left)
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            status = _wait(part, limit, environment, output.fileno())
        except OSError as error:
            return Outcome(part.name, FAILED, line=f"cannot be started: {error}")
        seconds = round(time.monotonic() - start, 1)
        output.seek(max(0, output.seek(0, os.SEEK_END) - TAIL))
        tail = output.read().decode(errors="replace")
    line = _last(tail, part.headline)
    if status == 0 and (line or not part.headline):
        return Outcome(part.name, PASSED, seconds, line, tail)
    if status == 0:
        line = f"no line of its output matches {part.headline!r}"
    else:
        why = f"killed at its limit of {limit:.3g} s" if status is None else f"exit status {status}"
        line = f"{why}: {line or _last(tail)}"
    return Outcome(part.name, FAILED, seconds, line, tail)


def _wait(part: Part, limit: float, environment: Mapping[str, str], output: int) -> int | None:
    """Return the exit status, or None if the process had to be killed."""
    process = subprocess.Popen(
        part.command,
        cwd=ROOT,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # SIGINT is ignored in a shell's background jobs, and so in all processes that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        _signal(process.pid, signal.SIGINT)  # pytest then still reports the tests that are done
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        _signal(process.pid, signal.SIGKILL)  # and any processes that it left running
        process.wait()


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _last(output: str, pattern: str = "") -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip() and re.search(pattern, line)]
    return lines[-1][:200] if lines else ""


def run(chosen: Sequence[Part], seconds: float, report: Report, environment: Mapping[str, str]) -> bool:
    """Run the parts one after the other and return whether none failed."""
    end = time.monotonic() + seconds
    report.write()
    for part in chosen:
        began = time.time()
        outcome = run_part(part, end - time.monotonic(), environment)
        report.parts.append(outcome)
        report.waiting.remove(part.name)
        if part.result is not None and part.result.exists() and part.result.stat().st_mtime >= began - 1:
            report.measured[part.name] = _quartiles(json.loads(part.result.read_text()))
        report.write()
        print(f"{part.name}: {outcome.outcome}, {outcome.seconds:.1f} s", flush=True)
        if outcome.outcome == FAILED or part.result is not None:
            print(f"{outcome.tail[-SHOWN:].rstrip()}\n", flush=True)
    return all(outcome.outcome != FAILED for outcome in report.parts)


def _quartiles(found: Any) -> Any:
    """Return a result without its samples, which stay in its own file."""
    if isinstance(found, dict):
        return {key: _quartiles(value) for key, value in found.items() if not key.startswith("samples")}
    return [_quartiles(value) for value in found] if isinstance(found, list) else found


def table(outcomes: Sequence[Outcome]) -> str:
    lines = ["| part | outcome | seconds | |", "|---|---|--:|---|"]
    lines += [f"| {o.name} | {o.outcome} | {o.seconds:.1f} | {o.line.replace('|', '/')} |" for o in outcomes]
    failed = [o.name for o in outcomes if o.outcome == FAILED]
    left = [o.name for o in outcomes if o.outcome == NOT_RUN]
    lines.append(f"\nFailed: {', '.join(failed) or 'none'}. Not run: {', '.join(left) or 'none'}.")
    return "\n".join(lines)


# ---------------------------------------------------------------------- the machine


def toolkit(environment: Mapping[str, str]) -> Path | None:
    """Return the folder of the CUDA toolkit, or None.

    The ``nvcc`` on the PATH may be a script that calls the toolkit's, so ``nvcc`` itself is asked for the folder.
    """
    named = environment.get("CUDA_HOME")
    if named and (Path(named) / "bin" / "nvcc").exists():
        return Path(named)
    nvcc = shutil.which("nvcc", path=environment.get("PATH"))
    if nvcc is None:
        folders = [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
        return next((folder for folder in folders if (folder / "bin" / "nvcc").exists()), None)
    here = re.search(r"_HERE_=(\S+)", said([nvcc, "-dryrun", "-x", "cu", "-c", os.devnull], environment))
    return (Path(here[1]) if here else Path(nvcc).resolve().parent).parent


def said(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Return the output of a short command; empty if it fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout + done.stderr).strip()


def driver() -> str:
    return said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).partition("\n")[0] or "unknown"


def environment_for_parts(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with the paths that the parts need.

    PYTHONPATH includes this tree, since nothing is installed; CUDA_HOME is the toolkit's folder, where torch's
    extension builder looks, and PATH includes the toolkit's tools.
    """

    def added(name: str, folder: Path) -> str:
        return os.pathsep.join(filter(None, [environment.get(name), str(folder)]))

    found = {**environment, "PYTHONPATH": added("PYTHONPATH", ROOT)}
    home = toolkit(environment)
    return found if home is None else {**found, "CUDA_HOME": str(home), "PATH": added("PATH", home / "bin")}


def machine(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the machine and software of the results; ``gpu`` is None if torch finds none."""
    probed = said([sys.executable, "-c", PROBE], environment).splitlines()
    try:
        found = json.loads(next(line for line in reversed(probed) if line.startswith("{")))
    except StopIteration:
        found = {"gpu": None, "torch": None}
    nvcc = re.search(r"release .*", said([f"{environment.get('CUDA_HOME', '')}/bin/nvcc", "--version"], environment))
    return {
        **found,
        "driver": driver(),
        "nvcc": nvcc[0] if nvcc else "none",
        "python": platform.python_version(),
        "commit": said(["git", "describe", "--always", "--dirty", "--abbrev=40"]) or "unknown",
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main(arguments: Sequence[str]) -> int:
    names = [part.name for part in parts(RESULTS)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="folder for the results (default: %(default)s)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"run only these parts, of {', '.join(names)} (default: all)",
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="seconds for all parts together (default: %(default)g)"
    )
    options = parser.parse_args(arguments)
    environment = environment_for_parts(os.environ)
    facts = machine(environment)
    if facts["gpu"] is None:
        why = "finds none" if facts["torch"] else "cannot be imported"
        print(f"gpu-check needs a GPU, but the torch of {sys.executable} {why}.", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the running part ends too
    out = options.out.resolve()
    chosen = [part for part in parts(out) if options.only is None or part.name in options.only]
    facts["left out"] = [f"{file} needs {name}, which is not installed" for file, name in unimportable().items()]
    report = Report(out / "gpu-check.json", facts, [part.name for part in chosen])
    passed = run(chosen, options.seconds, report, environment)
    for line in facts["left out"]:
        print(f"Left out: {line}")
    print(f"{facts['gpu']}, driver {facts['driver']}, torch {facts['torch']}, nvcc {facts['nvcc']}; {report.path}\n")
    print(table(report.parts))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
