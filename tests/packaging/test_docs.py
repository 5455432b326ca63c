"""The examples of the documentation run as they are printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def example(heading: str) -> str:
    """Return the first block of Python under a heading of docs/pipeline.md."""
    section = (ROOT / "docs" / "pipeline.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, "docs/pipeline.md", "exec"), names)
    return names


def test_save_resume_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = example("Save, resume, export")
    first = run(code)
    assert first["resumed"] is None
    folder = tmp_path / "runs" / "mine"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["checkpoint-000000040.pt", "checkpoint-000000060.pt", "model.pt"]
    (folder / names[1]).unlink()
    torch.manual_seed(5)
    again = run(code)
    assert again["resumed"].name == names[0]
    assert torch.equal(again["loss"], first["loss"])
    fresh = torch.nn.Sequential(*(type(m)(*shape(m)) for m in first["model"]))
    fresh.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    assert torch.equal(fresh(first["x"]), first["pipe"].predict(first["x"]))


def shape(layer: torch.nn.Module) -> tuple[int, ...]:
    return (layer.in_features, layer.out_features) if isinstance(layer, torch.nn.Linear) else ()
