"""The plain loops compute what their names say, and the ratios in the table are those of the rounds."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks import plain, summary, tables
from benchmarks.workloads import MORE_PEERS, Problem, torch_nadam_compiled

CONDITIONS = {"conditions": "here"}


@pytest.fixture
def needs_compiler():
    try:
        plain.library()
    except plain.NoCompilerError as missing:
        pytest.skip(str(missing))


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("needs_compiler", "threads")
def test_the_plain_loops_pass_over_every_element_once():
    sizes = (5, 1, 1000, 33, 257)
    lists = [[torch.full((n,), value) for n in sizes] for value in (1.0, 2.0, 3.0, 4.0)]
    plain.seven_streams(lists)()
    for p, g, m, v in zip(*lists, strict=True):
        assert torch.equal(g, torch.full_like(g, 2.0))
        torch.testing.assert_close(m, torch.full_like(m, 2.9))
        torch.testing.assert_close(v, torch.full_like(v, 3.8))
        torch.testing.assert_close(p, torch.full_like(p, 1.0 - 1e-3 * 6.7))
    assert plain.read_once(lists[1])() == 4.0 * sum(sizes)


@pytest.mark.usefixtures("needs_compiler")
def test_the_plain_loops_refuse_what_they_would_misread():
    with pytest.raises(ValueError, match="float32"):
        plain.read_once([torch.zeros(3, dtype=torch.bfloat16)])


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.parametrize("peer", [peer for peer in MORE_PEERS.values() if peer is not torch_nadam_compiled])
def test_the_plain_peers_step(peer):
    peer(Problem([(8, 8), (3,), (1,)]))()


@pytest.mark.slow
def test_the_compiled_peer_steps_as_the_eager_one():
    problem = Problem([(8, 8), (3,), (1,)])
    step = torch_nadam_compiled(problem)
    for _ in range(3):
        step()


def test_a_ratio_is_the_median_over_the_rounds():
    samples = {"ours": [1.0, 2.0, 4.0], "theirs": [3.0, 8.0, 4.0], "unused": [9.0, 9.0, 9.0]}
    found = summary.measured(summary.over("what", ">= 2", "theirs", "ours"), samples)
    assert found["quartiles"] == [1.0, 3.0, 4.0]
    assert found["of_medians"] == 2.0
    assert found["ms"] == {"theirs": 4000.0, "ours": 2000.0}
    shown = summary.table({**CONDITIONS, "rows": [found], "missing": []})
    assert shown.endswith("| what | >= 2 | 3.00 (1.00 to 4.00) | theirs 4000, ours 2000 |")


def rows():
    return {row.what: row for group in summary.GROUPS for row in group.rows}


@pytest.mark.parametrize(
    ("start", "times", "ratio"),
    [
        ("torch.optim.NAdam(foreach", {"foreach": 6.0, "ours": 2.0}, 3.0),
        ("bandwidth: ours / a plain", {"plain loop": 1.0, "ours": 2.0}, 0.5),
        ("ours with a ring of 8", {"ring of 8": 3.0, "ours": 2.0}, 1.5),
        ("what clipping adds", {"clipping": 5.0, "ours": 2.0, "read g": 1.5}, 2.0),
        ("bandwidth: ours in bfloat16", {"ours": 4.0, "bfloat16": 2.0}, 1.0),
        ("bandwidth: ours in bfloat16", {"ours": 4.0, "bfloat16": 4.0}, 0.5),
    ],
)
def test_rows_compare_the_right_way_round(start, times, ratio):
    (row,) = [row for what, row in rows().items() if what.startswith(start)]
    assert set(row.peers) == set(times)
    assert row.ratio(times) == pytest.approx(ratio)


def test_every_row_is_made_of_peers_of_its_group():
    for group in summary.GROUPS:
        peers = {**group.peers, **(group.half or {})}
        assert all(set(row.peers) <= set(peers) for row in group.rows)
        assert len(peers) == len(group.peers) + len(group.half or {})


def test_without_a_compiler_the_rows_that_need_it_are_absent_and_a_line_says_so(monkeypatch):
    def none():
        raise plain.NoCompilerError("there is none")

    monkeypatch.setattr(plain, "library", none)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    clipping = next(g for g in summary.GROUPS if summary.READ in g.peers)
    found = summary.run((dataclasses.replace(clipping, shapes=lambda: [(8, 8), (3,)]),), rounds=3)
    assert [row["what"] for row in found["rows"]] == [clipping.rows[1].what]
    assert summary.table(found).endswith("Not measured: there is none")
    assert len(found["samples_ms"][0]["ours"]) == 3


def test_a_compiler_that_fails_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(plain, "BUILD", tmp_path)
    for command in ("no-such-compiler", "false"):
        monkeypatch.setenv("CXX", command)
        with pytest.raises(plain.NoCompilerError, match=command):
            plain.library.__wrapped__()


def test_the_readme_has_a_summary_once_there_is_a_result(monkeypatch, tmp_path):
    for file in tables.RESULTS.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / tables.SUMMARY).unlink(missing_ok=True)
    assert "summary" not in tables.readme_sections()
    (tmp_path / tables.SUMMARY).write_text(json.dumps({**CONDITIONS, "rows": [], "missing": []}))
    assert "measured" in tables.readme_sections()["summary"]
