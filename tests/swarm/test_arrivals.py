"""What a worker checks of a message for its stage before it computes anything."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from swarm_task import ROWS, WIDTH, task

from nesterov_pp.swarm.jobs import Job
from nesterov_pp.swarm.lineage import ROOT
from nesterov_pp.swarm.messages import Link, Message, RefusedError
from nesterov_pp.swarm.worker import Worker

ROUTE = [[f"s{s}w0", f"127.0.0.1:{4000 + s}"] for s in range(3)]
BOTH: dict[str, Any] = {"m": 3, "a": 0, "stage": 1}
ACTIVATION = {**BOTH, "kind": "activation", "route": ROUTE, "count": [True] * 3, "f": [ROOT]}
GRADIENT = {**BOTH, "kind": "gradient", "f": [ROOT] * 3, "b": [[ROOT, ROOT]], "loss": "0x1p+0"}
ADOPT = {**BOTH, "kind": "adopt", "route": ROUTE, "count": [True] * 3, "f": []}
GOOD = torch.ones(ROWS, WIDTH)


@pytest.fixture
def worker() -> Iterator[Worker]:
    """The second of three workers, which holds microbatch 3, without threads that compute."""
    found = Worker("127.0.0.1:1", b"a secret of this test", lambda _: task("nesterov", 3))
    found._task, found._stage = task("nesterov", 3), 1
    found._rounds = cast(Any, SimpleNamespace(close=lambda: None))
    takeovers = SimpleNamespace(awaited=lambda _: None)
    found._computer = cast(
        Any, SimpleNamespace(held={(3, 0): Job(3, 0, ROUTE, [True] * 3, [ROOT])}, takeovers=takeovers)
    )
    found._built = True
    yield found
    found._close()


def _arrive(worker: Worker, header: dict[str, Any], *tensors: torch.Tensor) -> Job | None:
    worker._from_peer(cast(Link, None), Message(header, list(tensors)))
    return cast("Job | None", worker._jobs.next(0.0))


def test_good_ones_become_jobs(worker: Worker) -> None:
    forward = _arrive(worker, ACTIVATION, GOOD)
    assert forward is not None
    assert (forward.key, forward.backward, forward.given is GOOD) == ((3, 0), None, True)
    backward = _arrive(worker, GRADIENT, GOOD)
    assert backward is not None
    assert (backward.key, backward.backward, backward.route) == ((3, 0), [[ROOT, ROOT]], ROUTE)


def test_a_gradient_of_what_is_not_held_is_ignored(worker: Worker) -> None:
    assert _arrive(worker, {**GRADIENT, "m": 4}, GOOD) is None


@pytest.mark.parametrize("header", [ACTIVATION, GRADIENT])
@pytest.mark.parametrize(
    "tensors",
    [[], [GOOD, GOOD], [GOOD.double()], [torch.ones(ROWS, WIDTH + 1)], [torch.ones(WIDTH)], [GOOD.long()]],
)
def test_other_tensors_are_refused(worker: Worker, header: dict[str, Any], tensors: list[torch.Tensor]) -> None:
    with pytest.raises(RefusedError, match=r"not float32 of shape \(4, 6\)"):
        _arrive(worker, header, *tensors)


@pytest.mark.parametrize(
    "changed",
    [
        {**ACTIVATION, "stage": 2},
        {**ACTIVATION, "stage": 0},
        {**ACTIVATION, "f": []},
        {**ACTIVATION, "f": [ROOT, ROOT]},
        {**ACTIVATION, "route": ROUTE[:2]},
        {**ACTIVATION, "count": [True]},
        {**ACTIVATION, "f": ["7:nothing"]},
        {**GRADIENT, "stage": 0},
        {**GRADIENT, "f": [ROOT]},
        {**GRADIENT, "b": []},
        {**GRADIENT, "b": [[ROOT, "x"]]},
        {**GRADIENT, "loss": "one"},
        {**GRADIENT, "kind": "start"},
        {**ADOPT, "stage": 0},
        {**ADOPT, "f": [ROOT]},
        {**ADOPT, "f": [ROOT] * 4},
        {**ADOPT, "route": ROUTE[:2]},
        {**ADOPT, "count": [True]},
        {**ADOPT, "kind": "again", "hop": ROUTE[1]},
        {**ADOPT, "kind": "again", "stage": 2, "hop": ["s1w0", "nowhere"]},
        {**ADOPT, "kind": "replace", "stage": 0},
    ],
)
def test_other_places_and_versions_are_refused(worker: Worker, changed: dict[str, Any]) -> None:
    with pytest.raises(RefusedError):
        _arrive(worker, changed, GOOD)
    assert worker._jobs.next(0.0) is None
