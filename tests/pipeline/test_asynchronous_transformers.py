"""Models of transformers in several processes, compared bit for bit with the virtual pipeline.

With everything that strangers bring: groups, masks, lengths and rows that vary, checkpointed layers, weights for
unequal microbatches, a norm over all stages, and bfloat16 weights with masters.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from launch import finish, start

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("transformers", minversion="5")

from transformers_worker import KINDS, UPDATES, K, expected

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # from transformers
]
NAMES = [*KINDS, "llama-bf16"]
WORKER = Path(__file__).parents[1] / "transformers_worker.py"


@pytest.fixture(scope="module", params=[2, 4])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp("outcomes")
    results = finish(start([str(WORKER), str(folder), ",".join(NAMES)], request.param), timeout=600)
    assert [status for status, _ in results] == [0] * request.param, "\n".join(output for _, output in results)
    return request.param, folder


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_virtual_pipeline(outcomes: tuple[int, Path], name: str) -> None:
    stages, folder = outcomes
    found = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(stages)]
    wanted = expected(name, stages)
    assert len(found[-1]["losses"]) == K * UPDATES
    assert found[-1]["losses"] == wanted["losses"]
    assert sum(found[-1]["losses"][-20:]) < 0.75 * sum(found[-1]["losses"][:20])
    for ours, theirs in zip(found, wanted["weights"], strict=True):
        assert all(torch.equal(value, theirs[key]) for key, value in ours["weights"].items())
