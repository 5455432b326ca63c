"""``--diagnostics``: what a run measures, where it is written, and that nothing else changes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nesterov_pp.analysis import AlignmentMeter
from nesterov_pp.training.config import UserError
from nesterov_pp.training.metrics import MetricsLog, read_curves
from nesterov_pp.training.signals import InterruptionError
from nesterov_pp.training.trainer import train

Given = dict[str, Any]


@pytest.fixture
def given(text_file: Path) -> Given:
    model: Given = {"stages": 3, "layers": 3, "width": 16, "heads": 2, "context": 16, "batch": 4}
    run: Given = {"microbatches": 48, "warmup": 5, "eval_every": 20, "eval_batches": 2, "sample_length": 8}
    return {"data": str(text_file), **model, **run, "diagnostics": 10}


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_cosine_of_every_late_stage_is_logged_plotted_and_summed_up(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measurements begin at versions 10, 20, ... and end after the stage's delay."""
    train(given, tmp_path)
    cosines = read_curves(tmp_path / "metrics.jsonl").cosines
    assert {stage: [m for m, _ in points] for stage, points in cosines.items()} == {
        1: [12, 22, 32, 42],
        2: [11, 21, 31, 41],
    }
    values = [c for points in cosines.values() for _, c in points]
    assert all(-1.0 <= c <= 1.0 for c in values)
    assert len(set(values)) == len(values)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for stage, points in cosines.items():
        assert {e.step: e.value for e in events.Scalars(f"cosine/stage_{stage}")} == pytest.approx(dict(points))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["cosines"]["2"] == pytest.approx(sum(c for _, c in cosines[2]) / 4)
    assert f"by stage: 1: {summary['cosines']['1']:.3f}, 2: " in capsys.readouterr().out
    with Image.open(tmp_path / "alignment.png") as plot:
        assert plot.size == (1200, 750)


def test_losses_are_those_of_a_run_without_it(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(given, tmp_path / "with")

    def unused(*_: object) -> None:
        raise AssertionError("a run without --diagnostics reads no stash")

    monkeypatch.setattr(AlignmentMeter, "__init__", unused)
    train({**given, "diagnostics": None}, tmp_path / "without")
    assert [line for line in lines(tmp_path / "with") if "cosine" not in line] == lines(tmp_path / "without")
    assert not (tmp_path / "without" / "alignment.png").exists()


def test_an_interrupted_run_measures_the_same(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is stopped after microbatch 21, while stage 1's measurement from version 20 is under way."""
    train(given, tmp_path / "undisturbed")
    write = MetricsLog.write

    def write_and_signal(self: MetricsLog, **values: float) -> None:
        write(self, **values)
        if values["microbatch"] == 21 and "loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "write", write_and_signal)
        with pytest.raises(InterruptionError):
            train(given, tmp_path / "run")
    train({}, tmp_path / "run", resume=True)
    assert lines(tmp_path / "run") == lines(tmp_path / "undisturbed")


def test_a_run_can_begin_to_measure_when_it_goes_on(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = MetricsLog.write

    def write_and_signal(self: MetricsLog, **values: float) -> None:
        write(self, **values)
        if values["microbatch"] == 21 and "loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "write", write_and_signal)
        with pytest.raises(InterruptionError):
            train({**given, "diagnostics": None}, tmp_path)
    train({"diagnostics": 10}, tmp_path, resume=True)
    assert [m for m, _ in read_curves(tmp_path / "metrics.jsonl").cosines[1]] == [32, 42]


def test_without_a_late_stage_nothing_is_measured(given: Given, tmp_path: Path) -> None:
    train({**given, "method": "gpipe-1"}, tmp_path)
    assert read_curves(tmp_path / "metrics.jsonl").cosines == {}
    assert json.loads((tmp_path / "summary.json").read_text())["cosines"] == {}
    assert not (tmp_path / "alignment.png").exists()


def test_a_method_without_a_direction_is_refused(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("it has no direction")

    monkeypatch.setattr(AlignmentMeter, "__init__", refuse)
    with pytest.raises(UserError, match="--diagnostics does not work with method nesterov: it has no direction"):
        train(given, tmp_path / "run")
    assert not (tmp_path / "run").exists()
