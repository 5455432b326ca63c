"""The pipeline across processes against the virtual one: losses and weights bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launch import finish, start
from pipeline_worker import SCENARIOS, UPDATES, expected, k_of

WORKER = Path(__file__).parents[1] / "pipeline_worker.py"


@pytest.fixture(scope="module", params=[2, 3, 4])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Processes, and the folder where they left what came of all scenarios."""
    folder = tmp_path_factory.mktemp("outcomes")
    results = finish(start([str(WORKER), str(folder), ",".join(SCENARIOS)], request.param), timeout=300)
    assert [status for status, _ in results] == [0] * request.param, "\n".join(output for _, output in results)
    return request.param, folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of the clipping norm depend on the number of threads, and the processes have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SCENARIOS)
def test_equals_the_virtual_pipeline(outcomes: tuple[int, Path], name: str) -> None:
    """A hundred updates with dropout, clipping, a changing learning rate and validations in between."""
    stages, folder = outcomes
    found = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(stages)]
    wanted = expected(stages, name)
    assert [len(f["losses"]) for f in found] == [0] * (stages - 1) + [UPDATES * k_of(SCENARIOS[name])]
    assert found[-1]["losses"] == wanted["losses"]
    assert found[-1]["validations"] == wanted["validations"]
    for rank in range(stages):
        theirs = wanted["weights"][rank]
        assert all(torch.equal(value, theirs[key]) for key, value in found[rank]["weights"].items())
