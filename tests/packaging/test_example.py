"""The example runs as it is, and resumes after it was stopped."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from launch import ROOT, finish, start

EXAMPLE = ROOT / "examples" / "own_model.py"


def test_it_fits_on_a_page() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 50


def test_it_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (first, printed), (second, more) = finish(start([str(EXAMPLE)], 2), timeout=120)
    assert (first, second) == (0, 0), printed + more
    lines = (printed + more).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"update {k}" for k in (100, 200, 300, 400)]
    assert lines[-1].endswith("delays [1, 0]")
    folder = tmp_path / "runs" / "own_model"
    assert len(list(folder.glob("checkpoint-*.pt"))) >= 4
    for path in folder.glob("checkpoint-000000400.*"):
        path.unlink()
    exported = (folder / "model.pt").read_bytes()
    (first, printed), (second, more) = finish(start([str(EXAMPLE)], 2), timeout=120)
    assert (printed + more).splitlines() == lines[3:]
    assert (folder / "model.pt").read_bytes() == exported
    model = runpy.run_path(str(EXAMPLE))["model"]()
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    torch.manual_seed(0)
    points = torch.randn(512, 2)
    sectors = ((torch.atan2(points[:, 1], points[:, 0]) / torch.pi + 1.0) * 4.0).long().clamp(max=7)
    assert (model.eval()(points).argmax(1) == sectors).float().mean() > 0.9
