"""The comparison on images: its network, its data, its table."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import images


def test_it_reads_trains_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two classes that differ in brightness, in folders of a zip."""
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
    assert images.main(flags) == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split(" | ")[0] for row in rows] == ["| nesterov-sgd", "| pipedream"]
    assert all("100.0 %" in row for row in rows)
    assert images.main(["--data", str(tmp_path / "nowhere")]) == 2
    assert "no train.zip" in capsys.readouterr().err


def test_the_stages_fit_together() -> None:
    hidden = torch.zeros(2, 3, 32, 32)
    for stage in images.stages(10):
        hidden = stage(hidden)
    assert hidden.shape == (2, 10)
    assert len(images.stages(10)) == 8
