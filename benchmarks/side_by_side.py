"""Run test files in parallel without pytest-xdist: ``python -m benchmarks.side_by_side FILES -- -q``.

Each file has a pytest process of its own, which receives the options after ``--``. The last line counts all outcomes.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

OUTCOMES = ("failed", "error", "passed", "skipped", "deselected")
NO_TESTS = 5  # pytest's exit status if no test of a file is selected
SHOWN = 4_000  # characters printed of the output of a file with failures


def run_file(file: Path, options: Sequence[str]) -> tuple[int, str]:
    """Run a test file and return its exit status and output."""
    command = [sys.executable, "-m", "pytest", *options, str(file)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return (0 if done.returncode == NO_TESTS else done.returncode), done.stdout


def counted(output: str) -> Counter[str]:
    """Return the outcomes counted in the last line that pytest wrote."""
    lines = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|error|skipped|deselected)", line)]
    found = re.findall(r"(\d+) ([a-z]+?)s?\b", lines[-1]) if lines else []
    return Counter({name: int(number) for number, name in found if name in OUTCOMES})


def run(files: Sequence[Path], options: Sequence[str], processes: int) -> bool:
    """Run all files and return whether all passed. If interrupted, count the files that are done."""
    start, total, bad = time.monotonic(), Counter[str](), []
    pool = ThreadPoolExecutor(processes)
    runs = {pool.submit(run_file, file, options): file for file in files}
    done = 0
    try:
        for future in as_completed(runs):
            (status, output), file = future.result(), runs[future]
            done += 1
            total += counted(output)
            if status != 0:
                bad.append(str(file))
                print(f"{file}: exit status {status}\n{output[-SHOWN:].rstrip()}\n", flush=True)
    except KeyboardInterrupt:
        bad.append("interrupted")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if bad:
        print(f"Not passed: {', '.join(bad)}")
    outcomes = ", ".join(f"{total[name]} {name}" for name in OUTCOMES if total[name]) or "0 passed"
    print(f"{outcomes} in {time.monotonic() - start:.0f} s; {done} of {len(runs)} files", flush=True)
    return not bad


def main(arguments: Sequence[str]) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with SIGINT ignored
    at = list(arguments).index("--") if "--" in arguments else len(arguments)
    own, options = arguments[:at], arguments[at + 1 :]
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.side_by_side", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="test files, and folders of test files")
    parser.add_argument(
        "--ignore", nargs="+", type=Path, default=[], help="files and folders to leave out (default: none)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=cores,
        help="files to run at a time (default: the number of cores, %(default)s)",
    )
    given = parser.parse_args(own)
    for path in given.paths:
        if not path.exists():
            parser.error(f"{path} does not exist")
    found = [file for path in given.paths for file in ([path] if path.is_file() else path.rglob("test_*.py"))]
    files = {file for file in found if not {file, *file.parents} & set(given.ignore)}
    # Large files first, so that no long one is left at the end.
    ordered = sorted(files, key=lambda file: (-file.stat().st_size, file))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // given.processes)))
    return 0 if run(ordered, options, given.processes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
