"""The comparisons on other tasks: networks, data and table."""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import images, tasks, texts


def test_it_reads_trains_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Use two classes that differ in brightness, in folders inside a zip file."""
    draw = np.random.default_rng(0)
    for part in ("train", "test"):
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as file:
            for k in range(20):
                level = 60 if k % 2 else 190
                picture = Image.fromarray((level + draw.integers(-50, 50, (32, 32, 3))).astype(np.uint8))
                held = io.BytesIO()
                picture.save(held, "PNG")
                file.writestr(f"{part}/{'dark' if k % 2 else 'light'}/{k}.png", held.getvalue())
    x, y = images.read(tmp_path / "train.zip")
    assert x.shape == (20, 3, 32, 32)
    assert float(x[y == 0].mean()) < float(x[y == 1].mean()), "dark comes before light"
    flags = ["--data", str(tmp_path), "--methods", "nesterov-sgd,pipedream", "--microbatches", "30", "--batch", "8"]
    assert tasks.main(["images", *flags]) == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split(" | ")[0] for row in rows] == ["| nesterov-sgd", "| pipedream"]
    assert all("100.0 %" in row for row in rows)


@pytest.mark.slow
def test_text_through_an_encoder_decoder_and_in_two_precisions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "RATES", {True: (3e-3,), False: (0.1,)})
    text, table = tmp_path / "text.txt", tmp_path / "table.json"
    text.write_text("some words to learn from, again and again\n" * 400)
    flags = ["--data", str(text), "--methods", "nesterov", "--microbatches", "40", "--batch", "4"]
    for task in ("continuation", "language"):
        assert tasks.main([task, *flags, "--precision", "float32,bfloat16", "--json", str(table)]) == 0
        rows = json.loads(table.read_text())["rows"]
        assert [(row["method"], row["precision"]) for row in rows] == [("nesterov", p) for p in tasks.PRECISIONS]
        assert all(row["found"]["loss"] < 5.0 < math.log(256) for row in rows)
        assert len({row["found"]["loss"] for row in rows}) == 2
        for row in rows:
            assert row["found"]["loss"] == min(row["by_lr"].values())
        assert len(capsys.readouterr().out.splitlines()) == 2 + 2 + 2


@pytest.mark.parametrize("rates", [(), (1e-4, 2e-4, 4e-4)])
def test_the_first_seed_tries_every_rate_and_the_others_the_best(
    rates: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[float, int]] = []

    def trained(task: tasks.Task, method: str, lr: float, seed: int, *_: object) -> int:
        runs.append((lr, seed))
        return len(runs)

    losses = {1: 2.0, 2: math.nan, 3: 1.0, 4: 4.0, 5: 7.0}
    judged = SimpleNamespace(judge=lambda run: {"loss": losses[run], "accuracy": losses[run] / 10})
    monkeypatch.setattr(tasks, "train", trained)
    row = tasks.compare(judged, "nesterov", "float32", 3, 10, rates)
    low, middle, high = rates or tasks.RATES[True]
    assert runs == [(low, 0), (middle, 0), (high, 0), (high, 1), (high, 2)]
    assert (row.lr, row.each) == (high, [1.0, 4.0, 7.0])
    assert row.found == pytest.approx({"loss": 4.0, "accuracy": 0.4})
    assert list(row.by_lr) == [f"{lr:g}" for lr in (low, middle, high)]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("images --data nowhere", "nowhere must contain train.zip and test.zip"),
        ("language --data nowhere.txt", "nowhere.txt does not exist"),
        ("language --precision float64", "--precision takes float32 and bfloat16, not float64"),
        ("language --rates 1e-3,fast", "--rates takes learning rates above 0, like 1e-3,3e-3, not 1e-3,fast"),
        (
            "language --methods nesterov-no-stash --precision bfloat16",
            "or turn autocast off",
        ),
        ("language --methods adam", "unknown method 'adam'"),
    ],
)
def test_what_cannot_be_compared_is_named(flags: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tasks.main(flags.split()) == 2
    assert sentence in capsys.readouterr().err


def test_the_stages_fit_together() -> None:
    hidden = torch.zeros(2, 3, 32, 32)
    for stage in images.stages(10):
        hidden = stage(hidden)
    assert hidden.shape == (2, 10)
    assert len(images.stages(10)) == 8


def test_the_stages_of_the_encoder_decoder_fit_together() -> None:
    """The outputs have the expected shape, and none of them depends on a later byte."""
    stages = [stage.eval() for stage in texts.encoder_decoder()]
    assert len(stages) == 8
    source, target = torch.zeros(2, 64, dtype=torch.int64), torch.arange(64).view(2, 32)
    changed = target.clone()
    changed[:, 20] += 1
    outputs = []
    for given in (target, changed):
        hidden = (source, given)
        for stage in stages:
            hidden = stage(*hidden)
        outputs.append(hidden)
    assert outputs[0].shape == (2, 32, 256)
    torch.testing.assert_close(outputs[0][:, :20], outputs[1][:, :20])
    assert not torch.equal(outputs[0][:, 20:], outputs[1][:, 20:])
