"""The example runs as it is, and resumes after it was stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from launch import ROOT, finish, start

EXAMPLE = ROOT / "examples" / "own_model.py"


def test_it_fits_on_a_page() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60


def test_it_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (first, printed), (second, more) = finish(start([str(EXAMPLE)], 2), timeout=120)
    assert (first, second) == (0, 0), printed + more
    lines = (printed + more).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"update {k}" for k in (100, 200, 300, 400)]
    assert lines[-1].endswith("delays [1, 0]")
    for folder in ("000300", "000400"):
        shutil.rmtree(tmp_path / "runs" / "own_model" / folder)
    (first, printed), (second, more) = finish(start([str(EXAMPLE)], 2), timeout=120)
    assert (printed + more).splitlines() == lines[2:]
