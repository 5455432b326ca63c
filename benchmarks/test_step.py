"""The peers under pytest-benchmark: ``make bench``. The table of each group shows the ratios."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.plain import NoCompilerError
from benchmarks.workloads import MORE_PEERS, PEERS, WORKLOADS, Problem, prepare


@pytest.fixture(scope="module", params=list(WORKLOADS))
def workload(request: pytest.FixtureRequest) -> tuple[str, Problem]:
    return request.param, Problem(WORKLOADS[request.param]())


@pytest.mark.parametrize("peer", [*PEERS, *MORE_PEERS])
def test_step(benchmark: Any, workload: tuple[str, Problem], peer: str) -> None:
    name, problem = workload
    if peer in MORE_PEERS and name != "gpt2-small":
        pytest.skip("measured only on the large list")
    try:
        step = {**PEERS, **MORE_PEERS}[peer](problem)
    except NoCompilerError as missing:
        pytest.skip(str(missing))
    benchmark.group = name
    benchmark.extra_info["parameters"] = problem.elements
    benchmark.pedantic(step, setup=lambda: prepare(step), rounds=10, warmup_rounds=2)
