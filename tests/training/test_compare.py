"""A comparison with real processes: its files, its failures, and how it resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nesterov_pp.cli import main
from nesterov_pp.training import checkpoint
from nesterov_pp.training.metrics import microbatches_done

Start = Callable[..., "subprocess.Popen[str]"]


def test_a_comparison_its_failures_and_going_on(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["compare", *tiny, "--microbatches", "40", "--jobs", "2", "--out", str(out)]
    two = [*flags, "--methods", "nesterov,pipedream", "--seeds", "0"]
    assert main(two) == 0
    printed = capsys.readouterr().out
    assert "Validation loss: nesterov is" in printed
    result = json.loads((out / "compare.json").read_text())
    assert [row["method"] for row in result["methods"]] == ["nesterov", "pipedream"]
    assert result["failed"] == []
    for row in result["methods"]:
        summary = json.loads((out / row["method"] / "seed-0" / "summary.json").read_text())
        assert row["validation_losses"] == [summary["validation_loss"]]
    assert (out / "compare.md").read_text().count("\n| ") == 2
    assert (out / "compare.png").stat().st_size > 10_000

    assert main(two) == 2
    assert "add --resume" in capsys.readouterr().err

    # Add a method; one run is unfinished with a damaged checkpoint, and one is finished.
    unfinished = out / "pipedream" / "seed-0"
    (unfinished / "summary.json").unlink()
    (newest,) = checkpoint.checkpoints(unfinished)
    os.truncate(newest, 1000)
    finished = (out / "nesterov" / "seed-0" / "summary.json").stat().st_mtime_ns
    assert main([*flags, "--methods", "nesterov,pipedream,gpipe", "--seeds", "0", "--resume"]) == 1
    complaint = capsys.readouterr().err.strip()
    assert complaint.startswith("nesterov_pp: error: pipedream seed 0 failed (")
    assert "truncated or damaged; remove it" in complaint
    assert (out / "nesterov" / "seed-0" / "summary.json").stat().st_mtime_ns == finished
    result = json.loads((out / "compare.json").read_text())
    assert [row["method"] for row in result["methods"]] == ["nesterov", "gpipe"]
    assert len(result["failed"]) == 1

    newest.unlink()
    again = [*flags, "--methods", "nesterov,pipedream,gpipe", "--seeds", "0", "--resume", "--planned-time"]
    assert main(again) == 0
    rows = json.loads((out / "compare.json").read_text())["methods"]
    assert [row["method"] for row in rows] == ["nesterov", "pipedream", "gpipe"]
    assert all(row["planned_seconds"] > 0.0 for row in rows)
    assert "| Planned time |" in (out / "compare.md").read_text()


def test_a_run_of_another_configuration_stops_a_comparison_before_it_starts(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run = out / "nesterov" / "seed-0"
    assert main(["train", *tiny, "--microbatches", "5", "--out", str(run)]) == 0
    before = sorted(out.rglob("*"))
    flags = ["--methods", "pipedream,nesterov", "--seeds", "0", "--microbatches", "8", "--resume"]
    assert main(["compare", *tiny, *flags, "--out", str(out)]) == 2
    assert f"{run}: this run has --microbatches 5, not 8" in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before


@pytest.mark.slow
def test_a_stopped_comparison_goes_on_with_its_runs(tiny: list[str], tmp_path: Path, start: Start) -> None:
    out = tmp_path / "out"
    run = [*tiny, "--microbatches", "600"]
    flags = ["compare", *run, "--methods", "nesterov", "--seeds", "0", "--out", str(out), "--resume"]
    process = start(*flags)
    metrics = out / "nesterov" / "seed-0" / "metrics.jsonl"
    while microbatches_done(metrics) < 50:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    (sentence,) = errors.splitlines()
    assert "--resume continues them" in sentence
    (saved,) = checkpoint.checkpoints(metrics.parent)
    assert 0 < checkpoint.load(saved)["microbatch"] < 600
    assert main(flags) == 0
    assert main(["train", *run, "--out", str(tmp_path / "undisturbed")]) == 0
    assert metrics.read_bytes() == (tmp_path / "undisturbed" / "metrics.jsonl").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux ends a run whose comparison is killed")
def test_a_killed_comparison_takes_its_runs_with_it(tiny: list[str], tmp_path: Path, start: Start) -> None:
    out = tmp_path / "out"
    flags = ["--methods", "nesterov", "--seeds", "0", "--microbatches", "1000000", "--out", str(out)]
    process = start("compare", *tiny, *flags)
    run = out / "nesterov" / "seed-0"
    while microbatches_done(run / "metrics.jsonl") < 20:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while not checkpoint.checkpoints(run):
        assert time.monotonic() < deadline, "the run did not stop"
        time.sleep(0.05)


def loss_of(run: Path) -> float:
    return float(json.loads((run / "summary.json").read_text())["validation_loss"])


@pytest.mark.slow
def test_rates_and_depths(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A grid of learning rates and stages gives one folder each, the best rate in the table, and a table by depth.

    The first seed tries both rates; the second one uses its method's best.
    """
    out = tmp_path / "out"
    flags = [*tiny, "--microbatches", "40", "--jobs", "2", "--out", str(out), "--seeds", "3,0"]
    flags = [flag for k, flag in enumerate(flags) if "--stages" not in flags[max(0, k - 1) : k + 1]]
    grid = ["--methods", "gpipe-1,pipedream,xpipe", "--lr", "0.001,0.01", "--stages", "1,2"]
    assert main(["compare", *flags, *grid]) == 0
    result = json.loads((out / "compare.json").read_text())
    assert [(row["stages"], row["method"]) for row in result["methods"]] == [
        (n, m) for n in (1, 2) for m in ("gpipe-1", "pipedream", "xpipe")
    ]
    for row in result["methods"]:
        places = {lr: out / f"stages-{row['stages']}" / f"lr-{lr:g}" / row["method"] for lr in (0.001, 0.01)}
        losses = {lr: loss_of(place / "seed-3") for lr, place in places.items()}
        best = min(losses, key=losses.__getitem__)
        assert row["lr"] == best
        assert row["by_lr"] == {str(lr): loss for lr, loss in losses.items()}
        assert row["validation_losses"] == [losses[best], loss_of(places[best] / "seed-0")]
        assert [(place / "seed-0").exists() for place in places.values()] == [lr == best for lr in places]
    one, two = result["methods"][:3], result["methods"][3:]
    assert len({row["validation_loss"] for row in one}) == 1, "one stage has no delay"
    assert len({row["validation_loss"] for row in two}) == 3
    assert all(row["slowdown"] == 1.0 for row in one)
    assert two[0]["slowdown"] == 1.0
    assert [row["relative_tokens"] for row in one] == [1.0, 1.0, 1.0]
    assert all(row["reached"] > 0.0 and row["relative_tokens"] > 0.0 for row in two)
    table = (out / "compare.md").read_text()
    assert "| xpipe | " in table
    assert "| xpipe, tokens to " in table
    assert all(len(row["losses_by_lr"][str(row["lr"])]) == 2 for row in result["methods"])
    for name in ("compare.png", *(f"compare{what}-{n}-stages.png" for what in ("", "-rates") for n in (1, 2))):
        assert (out / name).stat().st_size > 10_000


@pytest.mark.slow
def test_every_seed_at_every_rate(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The runs that are there already are used, and each method is judged by its means."""
    out = tmp_path / "out"
    flags = ["compare", *tiny, "--microbatches", "20", "--jobs", "2", "--out", str(out), "--seeds", "0,1"]
    flags += ["--methods", "gpipe-1,pipedream:microbatches_per_update=2", "--lr", "0.001,0.01"]
    assert main(flags) == 0
    assert "6 runs of 20" in capsys.readouterr().out
    there = {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}
    assert len(there) == 6
    assert main([*flags, "--resume", "--every-rate"]) == 0
    printed = capsys.readouterr().out
    assert "8 runs of 20 microbatches, 2 at a time; 6 are already finished." in printed
    assert "compare-rates.png" in printed
    assert all(path.stat().st_mtime_ns == time for path, time in there.items())
    for row in json.loads((out / "compare.json").read_text())["methods"]:
        losses = {
            lr: [loss_of(out / f"lr-{lr:g}" / row["method"] / f"seed-{seed}") for seed in (0, 1)]
            for lr in (0.001, 0.01)
        }
        means = {lr: sum(each) / 2 for lr, each in losses.items()}
        assert row["losses_by_lr"] == {str(lr): each for lr, each in losses.items()}
        assert row["by_lr"] == pytest.approx({str(lr): mean for lr, mean in means.items()})
        assert row["lr"] == min(means, key=means.__getitem__)
        assert row["validation_losses"] == losses[row["lr"]]
    assert (out / "compare-rates.png").stat().st_size > 10_000
