"""Resharding keeps weights and moments; if nothing is late, the run continues bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import finish, start

from nesterov_pp.cli import main
from nesterov_pp.pipeline import stage_delays
from nesterov_pp.training import checkpoint
from nesterov_pp.training.config import UserError
from nesterov_pp.training.metrics import read_curves
from nesterov_pp.training.trainer import train

LOW = {"weights_dtype": "bfloat16", "master_weights": True, "no_decay": True, "weight_decay": 0.3}

SMALL = {**LOW, "master_weights": "24bit", "state_dtype": "8bit", "stash": "8bit-differences"}


def given(text_file: Path, stages: int, method: str, **more: Any) -> dict[str, Any]:
    model = {"stages": stages, "layers": 5, "width": 16, "heads": 2, "context": 16, "batch": 4}
    run = {"microbatches": 60, "warmup": 5, "eval_every": 20, "eval_batches": 2, "sample_length": 8}
    return {"data": str(text_file), "method": method, **model, **run, **more}


def half_way(text_file: Path, out: Path, stages: int, method: str, **more: Any) -> None:
    """Make a run of which only the checkpoint after 30 microbatches is left."""
    train(given(text_file, stages, method, checkpoint_every=30, **more), out)
    checkpoint.checkpoints(out)[-1].unlink()
    (out / "summary.json").unlink()


@pytest.mark.parametrize(
    ("old", "new", "method", "more"),
    [
        (1, 5, "gpipe-1", {}),
        (5, 2, "gpipe-1", {}),
        (2, 3, "gpipe-1", {**LOW, "state_dtype": "bfloat16"}),
        (2, 3, "gpipe-1", {**LOW, "master_weights": "24bit"}),
        (2, 3, "gpipe-1-nadam", {"no_decay": True, "weight_decay": 0.3, "betas": "0.9,0.95"}),
        (5, 2, "gpipe-1-rotated-nadam", {}),
        (2, 5, "gpipe-1-rotated", LOW),
    ],
)
def test_without_delay_the_losses_do_not_change(
    text_file: Path, tmp_path: Path, old: int, new: int, method: str, more: dict[str, Any]
) -> None:
    train(given(text_file, old, method, embedding_lr=3.0, **more), tmp_path / "whole")
    half_way(text_file, tmp_path / "old", old, method, embedding_lr=3.0, **more)
    arguments = ["reshard", "--run", str(tmp_path / "old"), "--stages", str(new), "--out", str(tmp_path / "new")]
    assert main([*arguments, "--one-process"]) == 0
    assert main(["train", "--resume", "--out", str(tmp_path / "new")]) == 0
    for name in ("metrics.jsonl", "sample.txt"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("nesterov", {}),
        ("nesterov", {"slack": 3}),
        ("xpipe", LOW),
        ("nesterov", {"stash": "8bit-differences"}),
        ("nesterov", SMALL),
        *(pytest.param(m, {}, marks=pytest.mark.slow) for m in ("nesterov-no-stash", "xpipe", "pipemare")),
        *(pytest.param(m, LOW, marks=pytest.mark.slow) for m in ("nesterov-no-stash", "nesterov-rotated")),
    ],
)
def test_into_the_stages_of_several_processes(
    text_file: Path, tmp_path: Path, method: str, more: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    half_way(text_file, tmp_path / "old", 4, method, tokenizer="bpe", vocab_size=270, **more)
    arguments = ["reshard", "--run", str(tmp_path / "old"), "--stages", "2"]
    assert main([*arguments, "--out", str(tmp_path / "new")]) == 0
    assert "The ring starts again from the newest weights" in capsys.readouterr().out
    assert main([*arguments, "--out", str(tmp_path / "alone"), "--one-process"]) == 0
    command = ["-m", "nesterov_pp", "train", "--resume", "--out", str(tmp_path / "new")]
    outputs = finish(start(command, 2), timeout=60)
    assert [status for status, _ in outputs] == [0, 0], outputs
    torch.set_num_threads(1)
    train({}, tmp_path / "alone", resume=True)
    assert (tmp_path / "new" / "metrics.jsonl").read_bytes() == (tmp_path / "alone" / "metrics.jsonl").read_bytes()
    assert len(read_curves(tmp_path / "new" / "metrics.jsonl").train) == 60


def test_another_slack(text_file: Path, tmp_path: Path) -> None:
    half_way(text_file, tmp_path / "old", 2, "nesterov", slack=1)
    arguments = ["reshard", "--run", str(tmp_path / "old"), "--stages", "3", "--slack", "4", "--one-process"]
    assert main([*arguments, "--out", str(tmp_path / "new")]) == 0
    train({}, tmp_path / "new", resume=True)
    summary = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert summary["delays"] == stage_delays(3, slack=4)
    with pytest.raises(UserError, match="this run has --slack 4, not 1; omit the flag"):
        train({"slack": 1}, tmp_path / "new", resume=True)


def test_bad_requests_change_nothing(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half_way(text_file, tmp_path / "old", 2, "nesterov")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "empty").mkdir()

    def refused(run: str, stages: int, out: str) -> str:
        arguments = ["--run", str(tmp_path / run), "--stages", str(stages), "--out", str(tmp_path / out)]
        assert main(["reshard", *arguments]) == 2
        return capsys.readouterr().err

    assert "full is not empty; give an empty or new folder" in refused("old", 3, "full")
    assert "5 layers cannot fill 6 stages" in refused("old", 6, "new")
    half_way(text_file, tmp_path / "forecast", 2, "poly-forecast")
    half_way(text_file, tmp_path / "rotated", 2, "basis-rotation")
    assert "keeps a history of each stage's gradients" in refused("forecast", 3, "new")
    assert "keeps more than one state per parameter" in refused("rotated", 3, "new")
    assert "empty holds no run" in refused("empty", 2, "new")
    for saved in checkpoint.checkpoints(tmp_path / "old"):
        saved.unlink()
    assert "holds no checkpoint" in refused("old", 3, "new")
    assert not (tmp_path / "new").exists()
