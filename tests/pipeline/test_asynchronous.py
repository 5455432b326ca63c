"""The pipeline across processes compared with the virtual one: losses and weights bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_schedules
from launch import finish, start
from pipeline_worker import (
    SCENARIOS,
    SHAPES,
    TWO_REPLICAS,
    UPDATES,
    expected,
    expected_of_method,
    expected_of_replicas,
    expected_of_shaped,
    expected_on_gpu,
    k_of,
    methods,
    shaped,
)
from tolerances import MANY_STEPS

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = [name for name, options in SCENARIOS.items() if "old_versions" in options]
"""Scenarios in which older versions are kept in another form than in full, which takes rings of more than two."""

PLAYED = {
    2: [name for name in SCENARIOS if name not in SHORT],
    3: ["nesterov", "no-stash", "three-per-update", "slack-jitter", "slack-no-stash", "int8-wire"],
    4: [
        *("nesterov", "no-stash", "pipedream-lr", "two-per-update", "drained", "synchronous", "recomputed", "jitter"),
        *("checkpointed", "slack", "slack-two-per-update", "slack-jitter"),
        *SHORT,
    ],
}
"""The scenarios for each number of processes."""

CARRIES_INTEGERS = torch.__version__ >= (2, 12)

WORKER = Path(__file__).parents[1] / "pipeline_worker.py"


def run(processes: int, folder: Path, names: Iterable[str]) -> None:
    """Run the scenarios, one after the other, in the same processes."""
    results = finish(start([str(WORKER), str(folder), ",".join(names)], processes), timeout=300)
    assert [status for status, _ in results] == [0] * processes, "\n".join(output for _, output in results)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function that runs the scenarios for a number of processes and returns the folder of their results."""

    @cache
    def of(processes: int) -> Path:
        folder = tmp_path_factory.mktemp("outcomes")
        run(processes, folder, PLAYED[processes])
        return folder

    return of


@pytest.fixture(scope="module")
def of_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    run(3, folder, [name for name in SHAPES if name != "tuples" or CARRIES_INTEGERS])
    return folder


@pytest.fixture(scope="module")
def of_replicas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    run(4, folder, TWO_REPLICAS)
    return folder


@pytest.mark.parametrize(("stages", "name"), [(n, name) for n, names in PLAYED.items() for name in names])
def test_equals_the_virtual_pipeline(outcomes: Callable[[int], Path], stages: int, name: str) -> None:
    """Compare 100 updates with dropout, clipping, a changing learning rate and validations in between."""
    folder = outcomes(stages)
    found = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(stages)]
    wanted = expected(stages, name)
    assert [len(f["losses"]) for f in found] == [0] * (stages - 1) + [UPDATES * k_of(SCENARIOS[name])]
    assert found[-1]["losses"] == wanted["losses"]
    assert found[-1]["validations"] == wanted["validations"]
    for rank in range(stages):
        theirs = wanted["weights"][rank]
        assert all(torch.equal(value, theirs[key]) for key, value in found[rank]["weights"].items())


def test_only_forwards_that_run_again_decode_whole_versions(outcomes: Callable[[int], Path]) -> None:
    for rank in range(4):
        plain, again = (
            torch.load(outcomes(4) / f"{name}-{rank}.pt") for name in ("differences", "differences-recomputed")
        )
        more = again["memory"]["stash"] - plain["memory"]["stash"]
        assert 0 < more <= plain["memory"]["weights"] if plain["delay"] else more == 0


@pytest.mark.parametrize("name", SHAPES)
def test_any_kind_of_stage(of_shapes: Path, name: str) -> None:
    """Several tensors between stages, a stage without trainable parameters, bfloat16, a cut ``nn.Sequential``."""
    stages, folder = 3, of_shapes
    if name == "tuples" and not CARRIES_INTEGERS:
        pytest.skip(f"torch {torch.__version__} carries floating-point tensors only between stages")
    found = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(stages)]
    if name == "by-time":  # the cut depends on the machine
        assert all(torch.equal(f["outputs"], found[0]["outputs"]) for f in found)
        assert found[-1]["losses"][-1] < found[-1]["losses"][0]
        assert sum(len(f["weights"]) for f in found) == len(list(shaped(name, stages)[0].parameters()))
        return
    wanted = expected_of_shaped(name, stages)
    if name == "tuples":  # two gradients of one tensor arrive separately and are added in another order
        assert found[-1]["losses"] == pytest.approx(wanted["losses"], rel=MANY_STEPS[torch.float32]["rtol"])
        return
    assert found[-1]["losses"] == wanted["losses"]
    if name not in ("frozen", "bfloat16"):
        assert all(torch.equal(f["outputs"], wanted["outputs"]) for f in found)
    for ours, theirs in zip(found, wanted["weights"], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(ours["weights"], theirs, strict=True))


@pytest.mark.parametrize("name", TWO_REPLICAS)
def test_two_replicas_of_two_stages(of_replicas: Path, name: str) -> None:
    """The run equals one pipeline with microbatches twice as large, and both replicas are the same bit for bit."""
    found = [torch.load(of_replicas / f"{name}-{rank}.pt") for rank in range(4)]
    wanted = expected_of_replicas(name)
    assert [f["exported"] for f in found[1:]] == [None] * 3
    own = {f"{k}.{key}": value for k in range(2) for key, value in found[k]["weights"].items()}
    assert found[0]["exported"].keys() == own.keys()
    assert all(torch.equal(value, own[key]) for key, value in found[0]["exported"].items())
    assert all(("save writes whole stages" in f["refusal"]) == name.startswith("sharded") for f in found)
    assert found[1]["losses"] == found[3]["losses"]
    assert found[1]["losses"] == pytest.approx(wanted["losses"], rel=MANY_STEPS[torch.float64]["rtol"])
    for rank in range(4):
        for key, value in found[rank]["weights"].items():
            assert torch.equal(value, found[(rank + 2) % 4]["weights"][key])
            torch.testing.assert_close(value, wanted["weights"][rank % 2][key], **MANY_STEPS[torch.float64])


@pytest.fixture(scope="module")
def of_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if torch.__version__ < (2, 10):
        pytest.skip("schedules of torch 2.9 send more over gloo than they receive")
    folder = tmp_path_factory.mktemp("torch")
    run(3, folder, torch_schedules.PLAYS)
    return folder


@pytest.mark.parametrize("name", torch_schedules.PLAYS)
def test_schedules_of_torch_give_the_same(of_torch: Path, name: str) -> None:
    found = [torch.load(of_torch / f"{name}-{rank}.pt") for rank in range(3)]
    wanted = torch_schedules.EXPECTED[name](3)
    close = MANY_STEPS[torch.float32]
    if name == "torch-1f1b-never-flushed":
        close = {"rtol": 0.0, "atol": 0.0}
    assert found[-1]["losses"] == pytest.approx(wanted["losses"], rel=close["rtol"], abs=0.0)
    for ours, theirs in zip(found, wanted["weights"], strict=True):
        for key, value in ours["weights"].items():
            torch.testing.assert_close(value, theirs[key], **close)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_for_each_stage(tmp_path: Path) -> None:
    run(2, tmp_path, ["gpus"])
    found, wanted = [torch.load(tmp_path / f"gpus-{rank}.pt") for rank in range(2)], expected_on_gpu(2)
    assert found[1]["losses"] == pytest.approx(wanted["losses"], rel=MANY_STEPS[torch.float32]["rtol"])
    for ours, theirs in zip(found, wanted["weights"], strict=True):
        for name, value in ours["weights"].items():
            torch.testing.assert_close(value, theirs[name], **MANY_STEPS[torch.float32])


@pytest.fixture(scope="module")
def of_methods(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("methods")
    run(3, folder, ["methods"])
    return [torch.load(folder / f"methods-{rank}.pt") for rank in range(3)]


@pytest.mark.parametrize("name", methods())
def test_every_method_that_says_so(of_methods: list[Any], name: str) -> None:
    wanted = expected_of_method(name, 3)
    assert of_methods[-1][name]["losses"] == wanted["losses"]
    for found, theirs in zip(of_methods, wanted["weights"], strict=True):
        assert all(torch.equal(value, theirs[key]) for key, value in found[name]["weights"].items())
