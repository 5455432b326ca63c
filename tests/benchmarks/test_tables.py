"""The figures in the README and docs are those of the committed results, and the README's examples run."""

from __future__ import annotations

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
