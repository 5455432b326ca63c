"""Whatever happens to one process, all processes end soon and say why."""

from __future__ import annotations

import re
import sys
import threading
import time

import pytest
from launch import ROOT, finish, free_port, start
from torch.distributed import HashStore

from nesterov_pp.pipeline import PipelineError
from nesterov_pp.pipeline.distributed.store import SharedStore
from nesterov_pp.pipeline.distributed.world import World, _meet, connect

WORKER = str(ROOT / "tests" / "pipeline_failures.py")
ENDINGS = str(ROOT / "tests" / "endings_worker.py")


def raised(outputs: list[tuple[int, str]], rank: int) -> str:
    status, output = outputs[rank]
    assert status == 1
    (line,) = [row for row in output.splitlines() if re.search(r"^\w+: .* ?\[[\d.]+ s\]$", row)]
    return line


def test_inf_names_microbatch_and_stage() -> None:
    outputs = finish(start([WORKER, "weights", "30"], 3), timeout=60)
    sentence = r"an activation is not finite at microbatch \d+, on stage 1"
    assert re.match(f"PipelineError: {sentence}", raised(outputs, 1))
    for rank in (0, 2):
        assert re.search(f"stage {rank} stopped because another process stopped: {sentence}", raised(outputs, rank))


def test_an_exception_is_passed_on() -> None:
    outputs = finish(start([WORKER, "exception", "30"], 3), timeout=60)
    assert raised(outputs, 1).startswith("KeyError: ")
    assert all("because another process stopped: KeyError: 'no such thing'" in raised(outputs, rank) for rank in (0, 2))


@pytest.mark.parametrize(
    ("what", "culprit", "sentence"),
    [
        ("batch", 0, "StopIteration (in the forward of microbatch 21 on stage 0)"),
        ("loss", 2, "ArithmeticError: no loss today (in the forward of microbatch 21 on stage 2)"),
    ],
)
def test_errors_in_the_users_code_name_type_stage_and_microbatch(what: str, culprit: int, sentence: str) -> None:
    outputs = finish(start([WORKER, what, "30"], 3), timeout=60)
    own = sentence.split(" (")[0]
    assert raised(outputs, culprit).startswith(own if ":" in own else f"{own}:")
    for rank in {0, 1, 2} - {culprit}:
        assert f"stage {rank} stopped because another process stopped: {sentence}" in raised(outputs, rank)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("tied", "PipelineError: stage 2's 1.weight is stage 0's 0.weight: tied parameters must be in one stage"),
        ("settings", "PipelineError: process 0 has seed 0, process 1 has 1; all processes of a pipeline need the same"),
    ],
)
def test_processes_that_do_not_fit_together_are_refused(what: str, sentence: str) -> None:
    outputs = finish(start([WORKER, what, "30"], 3), timeout=60)
    assert all(raised(outputs, rank).startswith(sentence) for rank in range(3))


def test_copies_of_a_parameter_are_not_tied() -> None:
    outputs = finish(start([WORKER, "copied", "30"], 3), timeout=60)
    assert [status for status, _ in outputs] == [0, 0, 0], outputs


def test_a_first_step_may_take_longer_than_the_timeout() -> None:
    outputs = finish(start([WORKER, "slow-at-first", "3"], 3), timeout=60)
    assert [status for status, _ in outputs] == [0, 0, 0], outputs


def test_a_dead_neighbour_is_noticed_at_once() -> None:
    outputs = finish(start([WORKER, "death", "30"], 3), timeout=60)
    assert outputs[1][0] == 9
    for rank in (0, 2):
        line = raised(outputs, rank)
        assert re.search(r"stage [02] could not (send|receive) .* (to|from) stage 1: that process has ended", line)
        assert float(line.split("[")[1].split()[0]) < 10.0


@pytest.mark.skipif(sys.platform != "linux", reason="threads are put last in Linux's way")
@pytest.mark.parametrize("pairs", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_process_ends_with_its_own_status_however_late_its_threads_are(pairs: int) -> None:
    ((status, output),) = finish(start([ENDINGS, str(pairs)], 1), timeout=120)
    assert (status, re.findall(r"^-?\d+ -?\d+$", output, re.MULTILINE)) == (0, ["2 2"] * pairs)


def test_a_hanging_neighbour_is_noticed_in_time() -> None:
    processes = start([WORKER, "hanging", "3"], 3)
    outputs = {rank: finish([processes[rank]], timeout=60)[0] for rank in (0, 2)}
    finish([], 0)
    processes[1].kill()
    processes[1].communicate()
    sentences = [raised([outputs.get(r, (0, "")) for r in range(3)], rank) for rank in (0, 2)]
    assert any("timed out after 3 s waiting to receive" in line and "from stage 1;" in line for line in sentences)
    assert all("stage 1" in line for line in sentences)


def test_bad_arguments() -> None:
    outputs = finish(start([WORKER, "arguments", "30"], 3), timeout=60)
    assert [status for status, _ in outputs] == [0, 0, 0], outputs
    for rank, (_, output) in enumerate(outputs):
        sentences = [line.removeprefix("refused: ") for line in output.splitlines() if line.startswith("refused: ")]
        wanted = [
            "2 stages need 2 processes per replica, but there are 3",
            "3 processes cannot be divided into 2 replicas",
            "receive_ahead must be at least 0, not -1",
            "the length of a run must be a positive multiple of 7 microbatches, not 100",
            "'nesterov-no-stash' keeps activations of older weights, which cannot be recomputed",
            'partition must be "time", "parameters", a number of stages or their sizes, not \'luck\'',
            "1 layers cannot be cut into 3 stages",
            "tied parameters must be in one stage",
            "the saved pipeline has method 'other', this one 'gpipe-1'",
            f"the saved pipeline has no stage {rank}; it has none",
            "the saved pipeline has delays [9], this one [0, 0, 0]",
            "load_state_dict takes what a pipeline's state_dict() returned",
            "the run of 3 microbatches is over",
            "load_state_dict must be called before the first step",
        ]
        assert len(sentences) == len(wanted), sentences
        assert all(part in sentence for part, sentence in zip(wanted, sentences, strict=True)), sentences


def test_a_store_that_outlives_its_processes_does_not_mix_up_meetings() -> None:
    """Whatever an earlier meeting left in the store, complete or aborted, the next meeting is independent of it."""
    store = HashStore()
    store.set("card/0", "gone")
    store.set("card/1", "gone")
    store.set("invitation", "gone gone gone")
    store.set("gone/all", "")
    names: list[str] = []
    for _ in range(3):
        found: dict[int, str] = {}

        def come(rank: int, found: dict[int, str] = found) -> None:
            time.sleep(0.05 * rank)
            found[rank] = _meet(SharedStore(store, 10.0), rank, 3, 10.0)

        threads = [threading.Thread(target=come, args=(rank,)) for rank in (2, 0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found.values())) == 1
        names.append(found[0])
    assert len(set(names)) == 3


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_environment_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for key, value in whole.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv(name)
    with pytest.raises(PipelineError, match=f"{name} is not set; start the processes with torchrun"), connect(1.0):
        pass


def test_without_a_store_there_is_no_reason() -> None:
    world = World(0, 1)
    world.tell("nothing")
    assert world.reason() is None
