"""The tools for a machine with a GPU, as far as they run without one."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check, profile_step, roofline, side_by_side
from benchmarks import rows as lists_of_rows
from benchmarks.gpu_check import FAILED, NOT_RUN, PASSED, Outcome, Part, Report, run_part

CPU = torch.device("cpu")
ENVIRONMENT = dict(os.environ)


def shell(name: str, script: str, limit: float = 10.0, **options: object) -> Part:
    return Part(name, ("sh", "-c", script), limit, **options)


def ends(pid: int) -> bool:
    """Return whether a killed process is gone within 5 s, or only waits for its parent to reap it."""
    stat, end = Path(f"/proc/{pid}/stat"), time.monotonic() + 5
    while time.monotonic() < end:
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


# ---------------------------------------------------------------------- gpu_check


def test_a_part_that_passes():
    outcome = run_part(shell("a", "echo first; echo; echo last"), 10, ENVIRONMENT)
    assert (outcome.outcome, outcome.line) == (PASSED, "last")
    assert outcome.tail == "first\n\nlast\n"


def test_a_part_that_fails_tells_its_status_and_its_last_line():
    outcome = run_part(shell("a", "echo why >&2; exit 3"), 10, ENVIRONMENT)
    assert (outcome.outcome, outcome.line) == (FAILED, "exit status 3: why")


def test_the_line_shown_is_the_last_that_matches_and_has_to_be_there():
    script = "echo 1 passed; echo 2 passed; echo more"
    assert run_part(shell("a", script, headline=r"\d passed"), 10, ENVIRONMENT).line == "2 passed"
    outcome = run_part(shell("a", script, headline="SUMMARY"), 10, ENVIRONMENT)
    assert (outcome.outcome, outcome.line) == (FAILED, "no line of its output matches 'SUMMARY'")


@pytest.mark.parametrize("trap", ["", "trap '' INT;"])
def test_a_part_that_hangs_is_killed_with_its_children(monkeypatch, trap):
    monkeypatch.setattr(gpu_check, "GRACE", 0.3)
    start = time.monotonic()
    outcome = run_part(shell("a", f"{trap} sleep 60 & echo $!; sleep 60; sleep 60", limit=0.5), 10, ENVIRONMENT)
    assert time.monotonic() - start < 5
    assert outcome.outcome == FAILED
    assert outcome.line.startswith("killed at its limit of 0.5 s")
    assert ends(int(outcome.tail.split()[0]))


def test_what_a_part_leaves_running_is_ended():
    outcome = run_part(shell("a", "sleep 60 & echo $!"), 10, ENVIRONMENT)
    assert outcome.outcome == PASSED
    assert ends(int(outcome.line))


def test_a_part_may_speak_at_its_limit():
    outcome = run_part(shell("a", "trap 'echo 1 passed; exit' INT; sleep 60", limit=0.5), 10, ENVIRONMENT)
    assert outcome.line.endswith(": 1 passed")


def test_parts_that_cannot_run():
    assert run_part(shell("a", "true", tool="no-such-tool"), 10, ENVIRONMENT) == Outcome(
        "a", NOT_RUN, line="not run: no-such-tool is not installed"
    )
    assert run_part(shell("a", "true", limit=40), 9, ENVIRONMENT) == Outcome("a", NOT_RUN, line="not run: no time left")
    outcome = run_part(Part("a", ("no-such-program",), 1), 10, ENVIRONMENT)
    assert outcome.outcome == FAILED
    assert outcome.line.startswith("cannot be started: ")


def test_the_report_is_whole_after_each_part_and_the_time_is_shared(tmp_path, capsys):
    path, result = tmp_path / "new" / "gpu-check.json", tmp_path / "rows.json"
    rows = json.dumps({"rows": [{"quartiles_ms": [1, 2, 3], "samples_ms": [1, 2, 3]}]})
    show = f"import json; d = json.load(open({str(path)!r})); print(len(d['parts']), *d['waiting'])"
    chosen = [
        shell("one", f"echo '{rows}' > {result}; exit 1", result=result),
        Part("two", (sys.executable, "-c", show), 10),
        shell("three", "true", limit=1000),
    ]
    report = Report(path, {"gpu": "none"}, [part.name for part in chosen])
    assert not gpu_check.run(chosen, 30, report, ENVIRONMENT)
    found = json.loads(path.read_text())
    assert [part["outcome"] for part in found["parts"]] == [FAILED, PASSED, NOT_RUN]
    assert found["parts"][1]["line"] == "1 two three"
    assert found["parts"][2]["line"] == "not run: no time left"
    assert (found["gpu"], found["waiting"]) == ("none", [])
    assert found["measured"] == {"one": {"rows": [{"quartiles_ms": [1, 2, 3]}]}}
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert "three: not run" in capsys.readouterr().out


@pytest.fixture
def on_a_gpu(monkeypatch):
    facts = {"gpu": "a GPU", "driver": "1", "torch": "2", "nvcc": "3"}
    monkeypatch.setattr(gpu_check, "machine", lambda environment: dict(facts))
    monkeypatch.setattr(gpu_check, "unimportable", lambda: {"tests/test_x.py": "x"})
    monkeypatch.setattr(gpu_check, "parts", lambda out: [shell("good", "echo 'a|b'"), shell("bad", "exit 1")])
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("on_a_gpu")
def test_the_table_comes_last_and_the_status_tells_of_failures(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"\| good \| passed \| \d\.\d \| a/b \|", printed)
    assert printed.endswith("Failed: bad. Not run: none.\n")
    assert gpu_check.main(["--out", str(tmp_path), "--only", "good"]) == 0
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [part["name"] for part in found["parts"]] == ["good"]
    assert found["left out"] == ["tests/test_x.py needs x, which is not installed"]
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "unknown"])


def test_without_a_gpu_one_sentence_says_so_and_nothing_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("gpu-check needs a GPU, but ")
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_parts_fit_together(tmp_path):
    parts = gpu_check.parts(tmp_path)
    assert len({part.name for part in parts}) == len(parts)
    assert gpu_check.SECONDS + gpu_check.GRACE < 9 * 60
    used = {module for part in parts for module in part.command if module.startswith("benchmarks.")}
    assert used == {tool.__name__ for tool in (roofline, profile_step, side_by_side)}


def test_the_toolkit_is_found_behind_a_script(tmp_path, monkeypatch):
    home = tmp_path / "cuda"
    for folder in (home / "bin", tmp_path / "bin"):
        folder.mkdir(parents=True)
        (folder / "nvcc").write_text(f"#!/bin/sh\necho '#$ _HERE_={home}/bin' >&2\n")
        (folder / "nvcc").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    assert gpu_check.toolkit({"PATH": path}) == home
    assert gpu_check.toolkit({"PATH": "/nowhere", "CUDA_HOME": str(home)}) == home
    found = gpu_check.environment_for_parts({"PATH": path, "CUDA_HOME": "/nowhere"})
    assert found == {"PATH": f"{path}:{home}/bin", "CUDA_HOME": str(home), "PYTHONPATH": str(gpu_check.ROOT)}
    monkeypatch.setattr(gpu_check, "toolkit", lambda environment: None)
    assert gpu_check.environment_for_parts({"PYTHONPATH": "/a"}) == {"PYTHONPATH": f"/a:{gpu_check.ROOT}"}


def test_tests_that_cannot_be_imported_are_named(tmp_path):
    folder = tmp_path / "tests" / "a"
    folder.mkdir(parents=True)
    (folder / "shared.py").write_text("import missing_one\n")
    (folder / "test_a.py").write_text("import os\nfrom shared import x\n")
    (folder / "test_b.py").write_text("import os\nfrom missing_one.y import x\n")
    assert gpu_check.unimportable(tmp_path).items() >= {"tests/a/test_b.py": "missing_one"}.items()


# ---------------------------------------------------------------------- roofline


def test_bytes_of_each_row():
    counted = {row.name.removeprefix("nesterov_pp.NAdam, cuda"): row.bytes for row in lists_of_rows.our_rows("cuda")}
    assert counted == {
        "": 28,
        ", ring of 8": 28,
        ", max_grad_norm=1.0": 32,
        ", bfloat16 moments": 20,
        ", bfloat16": 14,
        ", bfloat16 with float32 masters": 28,
        ", 8-bit moments": 16.25,
        ", bfloat16 with 24-bit masters": 24,
        ", bfloat16 with 24-bit masters, 8-bit moments": 12.25,
        ", as a CUDA graph": 28,
    }
    assert [row.bytes for row in lists_of_rows.peers() if row.name.startswith("torch.")] == [28] * 5


def test_the_lists_are_as_large_as_they_say():
    lists = {name: make() for name, make in lists_of_rows.WORKLOADS.items()}
    sizes = {name: (len(shapes), sum(map(math.prod, shapes))) for name, shapes in lists.items()}
    assert sizes["gpt2-small"] == (148, 124_439_808)
    assert sizes["1b"] == (292, 1_017_302_272)
    assert sizes["one"] == (1, 2**28)
    assert sizes["tiny"][1] == sizes["tiny-in-one"][1] == 2000 * 1024


def test_the_roofline_on_the_cpu(tmp_path, capsys, monkeypatch):
    path = tmp_path / "found.json"
    asked = ["--device", "cpu", "--workload", "short", "odd", "--rounds", "2", "--no-compile", "--json", str(path)]
    monkeypatch.setitem(lists_of_rows.WORKLOADS, "odd", lambda: [(3,), (5, 7)])
    assert roofline.main(asked) == 0
    printed = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["device"] == "cpu"
    assert {"torch", "python", "commit", "driver", "rounds"} <= found.keys()
    short, odd_found = found["workloads"]
    assert (short["workload"], short["tensors"], odd_found["parameters"]) == ("short", 5, 38)
    for row in short["rows"]:
        low, median, high = row["quartiles_ms"]
        assert 0 < low <= median <= high
        moved = row["bytes_per_parameter"] * short["parameters"]
        assert row["gb_per_s"] == pytest.approx(moved / median / 1e6, rel=0.01, abs=0.01)
        assert len(row["samples_ms"]) == 2
        assert row["launches"] is None
        assert f"| {row['name']} | {row['bytes_per_parameter']} |" in printed
    rows = {row["name"]: row for row in short["rows"]}
    assert rows.keys() >= {"nesterov_pp.NAdam, reference", "torch.optim.AdamW(fused=True)"}
    assert short["rows"][0]["times_ours"] == [1.0, 1.0, 1.0]
    assert short["failed"] == []
    (refused,) = [name for name in short["missing"] if "capturable" in name]
    assert f"Not measured: {refused}: AssertionError: If capturable=True" in printed
    assert printed.splitlines()[-1].startswith("measured ")


def test_a_row_of_ours_that_fails_is_told_and_fails_the_run(monkeypatch, capsys):
    def none(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory\nand more")

    monkeypatch.setattr(lists_of_rows, "Ours", none)
    rows = "reference|AdamW"
    assert roofline.main(["--device", "cpu", "--workload", "short", "--rounds", "2", "--rows", rows]) == 1
    printed = capsys.readouterr().out
    assert "Not measured: nesterov_pp.NAdam, reference: OutOfMemoryError: out of memory\n" in printed
    assert "| torch.optim.AdamW(fused=True) | 28 |" in printed
    assert "foreach" not in printed


def test_a_step_that_fails_later_is_left_out_from_then_on():
    calls = []

    def second_time() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("why")

    failed: dict[str, str] = {}
    steps = {"fails": second_time, "works": lambda: None}
    samples = roofline.measure(steps, roofline.HostClock(), 4, failed)
    assert failed == {"fails": "RuntimeError: why"}
    assert {name: len(times) for name, times in samples.items()} == {"works": 4}
    assert list(steps) == ["works"]


def test_ratios_are_those_of_single_rounds():
    row = lists_of_rows.Row("row", lambda problem: lambda: None, 10, 0)
    samples = {
        "row": [(1.0, 0.1), (2.0, 0.1), (4.0, 0.1)],
        "first": [(1.0, 0.0)] * 3,
        roofline.COPY: [(1.0, 0.0), (1.0, 0.0), (8.0, 0.0)],
    }
    found = roofline.measured(row, 2, samples, "first", copied=40)
    assert found["of_copy"] == [0.375, 0.5, 0.75]  # between the ratios of the rounds: 0.25, 0.5 and 1
    assert found["times_ours"] == [1.5, 2.0, 3.0]
    assert found["host_us"] == [1e5, 1e5, 1e5]


def test_rows_share_the_memory_and_what_is_compiled_comes_last_and_alone():
    def row(name: str, held: int, compiled: bool = False) -> lists_of_rows.Row:
        return lists_of_rows.Row(name, lambda problem: lambda: None, 28, held, compiled=compiled)

    rows = [row("c", 1, True), row("big", 90), row("x", 4), row("y", 4), row("z", 4)]
    assert [[r.name for r in group] for group in roofline.groups(rows, 10, 80.0)] == [["big"], ["x", "y"], ["z"], ["c"]]


class FakeEvent:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record(self) -> None:
        self.log.append("record")

    def elapsed_time(self, end: FakeEvent) -> float:
        return 3.0


def test_the_device_is_timed_while_the_host_is_ahead(monkeypatch):
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(log))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("busy"))

    def step() -> None:
        log.append("step")

    step.prepare = lambda: log.append("prepare")  # type: ignore[attr-defined]
    device, host = roofline.CudaClock().time(step)
    assert (device, host < 1) == (3e-3, True)
    assert log == ["prepare", "wait", "step", "prepare", "wait", "busy", "record", "step", "record", "wait"]


def test_launches_are_counted(monkeypatch):
    counts = {"cudaLaunchKernel": 2, "cuLaunchKernelEx": 3, "cudaLaunchKernelExC": 1, "cudaMemcpyAsync": 9}
    events = [SimpleNamespace(key=key, count=count) for key, count in counts.items()]

    @contextmanager
    def profile(activities):
        yield SimpleNamespace(key_averages=lambda: events)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent([]))
    assert roofline.CudaClock().launches(lambda: None) == 6
    events.clear()
    assert roofline.CudaClock().launches(lambda: None) is None


def test_the_picture(tmp_path, monkeypatch):
    row = {"name": "a", "ours": True, "bytes_per_parameter": 28, "gb_per_s": 5.0, "copy_gb_per_s": 6.0}
    found = [{"workload": "w", "rows": [row, {**row, "name": "b", "ours": False}]}]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert roofline.draw(found, tmp_path / "x.png") == "The picture is left out: matplotlib is not installed."
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert roofline.draw(found, tmp_path / "a" / "x.png").startswith("Picture: ")
    assert (tmp_path / "a" / "x.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------- profile_step


@pytest.mark.parametrize("ring", [[], ["--ring", "2"]])
@pytest.mark.parametrize("clip", [[], ["--clip", "1.0"]])
def test_steps_to_profile(capsys, ring, clip):
    asked = ["--device", "cpu", "--backend", "reference", "--workload", "short", "--steps", "2"]
    assert profile_step.main([*asked, *ring, *clip]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 steps of short by reference")
    assert ("gradients of norm 3." in printed) == bool(clip)


def test_all_backends_are_those_that_can_be_used(monkeypatch):
    reasons = {"cuda": None, "triton": "why", "cpu": None, "reference": None}
    monkeypatch.setattr(profile_step.npp.kernels, "available_backends", lambda: reasons)
    assert profile_step.backends("all", "cuda") == ["cuda"]
    assert profile_step.backends("all", "cpu") == ["cpu"]
    assert profile_step.backends("triton", "cuda") == ["triton"]
    reasons["cuda"] = "why"
    assert profile_step.backends("all", "cuda") == ["reference"]


def test_the_parts_of_a_step_are_ranges():
    names: list[str] = []

    @contextmanager
    def mark(name: str):
        names.append(name)
        yield

    problem = lists_of_rows.Problem([(3,), (5, 7)], torch.float32, CPU)
    step = lists_of_rows.Ours(problem, "reference", ring=2, max_grad_norm=1.0)
    profile_step.mark_parts(step, mark)
    profile_step.run({"reference": step}, 1, mark)
    assert names == ["optimizer.step, reference", "ring check", "gather", "norm", "step", "ring advance"]
