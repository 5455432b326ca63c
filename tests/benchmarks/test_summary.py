"""The plain loops do what they say, and the table's ratios are those of the rounds."""

from __future__ import annotations

import pytest
import torch

from benchmarks import plain, summary
from benchmarks.workloads import Problem, plain_loop, plain_read, torch_nadam_compiled


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_plain_loops_pass_over_every_element_once(threads):
    before = torch.get_num_threads()
    lists = [[torch.full((n,), value) for n in (5, 1, 1000, 33)] for value in (1.0, 2.0, 3.0, 4.0)]
    try:
        torch.set_num_threads(threads)
        plain.seven_streams(lists)()
    finally:
        torch.set_num_threads(before)
    for p, g, m, v in zip(*lists, strict=True):
        assert torch.equal(g, torch.full_like(g, 2.0))
        torch.testing.assert_close(m, torch.full_like(m, 0.9 * 3 + 0.2))
        torch.testing.assert_close(v, torch.full_like(v, 0.9 * 4 + 0.2))
        torch.testing.assert_close(p, torch.full_like(p, 1.0 - 1e-3 * (0.9 * 7 + 0.4)))


def test_peers_of_the_summary_step():
    problem = Problem([(8, 8), (3,), (1,)])
    for peer in (plain_loop, plain_read):
        peer(problem)()


@pytest.mark.slow
def test_the_compiled_peer_steps():
    torch_nadam_compiled(Problem([(8, 8), (3,), (1,)]))()


def test_rows_are_medians_of_the_ratios_of_each_round():
    samples = {"ours": [1.0, 2.0, 4.0], "theirs": [3.0, 8.0, 4.0]}
    found = summary.row("what", ">= 2", samples, lambda t: t["theirs"] / t["ours"])
    assert found["quartiles"] == [1.0, 3.0, 4.0]
    assert found["ms"] == {"ours": 2000.0, "theirs": 4000.0}
    assert "| what | >= 2 | 3.00 (1.00 to 4.00) | ours 2000, theirs 4000 |" in summary.table(
        {"conditions": "here", "rows": [found]}
    )
