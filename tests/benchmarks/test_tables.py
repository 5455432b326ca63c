"""The figures in the README and docs are those of the committed results, and the README's examples run."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.workloads import PEERS, Problem, gpt2_small, prepare

README = tables.ROOT / "README.md"


@pytest.mark.parametrize("page", tables.sections())
def test_pages_show_the_committed_results(page):
    text = (tables.ROOT / page).read_text()
    assert tables.fill(text, tables.sections()[page]) == text, "run `python -m benchmarks.tables`"


def finished(folder: Path, method: str, batch: int, losses: dict[float, list[float]]) -> None:
    """Write what ``compare --every-rate`` leaves of one method, as far as the tables read it."""
    config = {"stages": 8, "layers": 8, "width": 64, "microbatches": 800 // batch, "batch": batch, "context": 32}
    config |= {"lr": 1e-3, "warmup": 100, "embedding_lr": 10.0}
    means = {lr: sum(each) / len(each) for lr, each in losses.items()}
    best = min(means, key=means.__getitem__)
    row = {"method": method, "lr": best, "validation_loss": means[best], "validation_losses": losses[best]}
    row["spread"] = max(losses[best]) - min(losses[best])
    row["by_lr"] = {str(lr): mean for lr, mean in means.items()}
    row["losses_by_lr"] = {str(lr): each for lr, each in losses.items()}
    for lr in losses:
        run = folder / f"lr-{lr:g}" / method / "seed-0"
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"config": {**config, "lr": lr}}))
    (folder / "compare.json").write_text(json.dumps({"methods": [row], "comparison": f"{method}.", "failed": []}))


def test_comparisons_with_rates_of_their_own_are_taken_into_one_table(tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "kept")
    finished(tmp_path / "runs" / "a", "nesterov", 2, {0.001: [2.0, 2.5], 0.002: [2.25, 2.375]})
    finished(tmp_path / "runs" / "b", "gpipe", 8, {0.002: [3.0, 3.0]})
    tables.record(tmp_path / "runs", "two.json", None, "abc")
    found = json.loads((tmp_path / "kept" / "two.json").read_text())
    assert (found["commit"], found["comparison"], found["failed"]) == ("abc", "nesterov. gpipe.", [])
    assert found["conditions"].startswith(
        "8 stages, 8 layers of width 64, warm-up 100, embeddings at 10 times the rate,"
    )
    assert tables.batches_table(found).splitlines()[2:] == [
        "| sequences a microbatch, microbatches | 2, 400 | 8, 100 |",
        "|---|--:|--:|",
        "| nesterov | 2.250 (0.500), lr 0.001 | - |",
        "| gpipe | - | 3.000 (0.000), lr 0.002 |",
    ]


def test_losses_over_rates(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    finished(tmp_path / "runs", "nesterov", 2, {0.002: [2.25, 2.375], 0.001: [2.0, 2.5]})
    tables.record(tmp_path / "runs", "rates.json", None, "abc")
    table = tables.rates_table(json.loads((tmp_path / "rates.json").read_text()))
    assert table.splitlines()[0].startswith("8 stages, 8 layers of width 64, 400 microbatches of 2 x 32 bytes, warm-up")
    assert table.splitlines()[2:] == [
        "| mean at | 0.001 | 0.002 | each seed at the best |",
        "|---|--:|--:|---|",
        "| nesterov | **2.250** | 2.312 | 2.000 2.500 |",
    ]


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(examples())))
def test_the_readmes_examples_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = examples()[number]
    with warnings.catch_warnings():
        if "transformers" in code:
            warnings.simplefilter("ignore")
            pytest.importorskip("transformers", minversion="5")
        exec(compile(code, f"README example {number}", "exec"), {"__name__": "example"})


def test_every_local_link_of_the_readme_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text())
    assert links
    assert [link for link in links if not (Path(tables.ROOT) / link).exists()] == []


@pytest.mark.parametrize("peer", list(PEERS))
def test_every_peer_steps(peer):
    problem = Problem([(8, 8), (3,), (1,)])
    step = PEERS[peer](problem)
    for _ in range(3):
        prepare(step)
        step()


def test_the_list_is_as_large_as_it_says():
    shapes = gpt2_small()
    assert len(shapes) == 148
    assert sum(a * (b[0] if b else 1) for a, *b in shapes) == 124_439_808
