"""The peers under pytest-benchmark: ``make bench``. The group's table shows the ratios."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.workloads import PEERS, WORKLOADS, Problem, prepare


@pytest.fixture(scope="module", params=list(WORKLOADS))
def workload(request: pytest.FixtureRequest) -> tuple[str, Problem]:
    return request.param, Problem(WORKLOADS[request.param]())


@pytest.mark.parametrize("peer", list(PEERS))
def test_step(benchmark: Any, workload: tuple[str, Problem], peer: str) -> None:
    name, problem = workload
    step = PEERS[peer](problem)
    benchmark.group = name
    benchmark.extra_info["parameters"] = problem.elements
    benchmark.pedantic(step, setup=lambda: prepare(step), rounds=10, warmup_rounds=2)
