"""A store that no longer answers, as behind a link that is gone, ends every process in time and with one sentence."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import pytest
from launch import ROOT, finish, free_port, start
from torch import distributed as dist

from nesterov_pp.pipeline import PipelineError
from nesterov_pp.pipeline.distributed.store import Answer, SharedStore
from nesterov_pp.pipeline.distributed.world import World

WORKER = str(ROOT / "tests" / "pipeline_failures.py")
PATIENCE, MARGIN = 3.0, 12.0
"""The timeout of the processes, and the seconds that a busy machine may take beyond it."""

SERVE = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("serving", flush=True)
time.sleep(600)
"""


class Server(NamedTuple):
    process: subprocess.Popen[str]
    port: int

    def freeze(self) -> None:
        """Stop the process, and wait until all of its threads have stopped."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A store in a process of its own, as torchrun has it."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(port)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    yield Server(process, port)
    process.kill()
    process.communicate()


def client(port: int) -> dist.Store:
    return dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=30), wait_for_workers=False)  # type: ignore[attr-defined]


def sentence(result: tuple[int, str]) -> tuple[str, float]:
    """Return a process's last words, and for how many seconds it had waited then."""
    status, output = result
    assert status == 1, output
    (line,) = [row for row in output.splitlines() if re.search(r"^PipelineError: .* ?\[[\d.]+ s\]$", row)]
    return line, float(line.split("[")[-1].split()[0])


def test_a_frozen_store_is_noticed_when_connecting(server: Server) -> None:
    server.freeze()
    for rank, result in enumerate(finish(start([WORKER, "none", str(PATIENCE)], 2, server.port), timeout=60)):
        words, seconds = sentence(result)
        assert f"process {rank} of 2 found no process at 127.0.0.1:{server.port} within 3 s" in words
        assert seconds < PATIENCE + MARGIN


def test_a_store_that_freezes_while_the_processes_meet(server: Server) -> None:
    store = client(server.port)
    first = start([WORKER, "none", str(PATIENCE)], 2, server.port)
    first[1].kill()
    while not store.check(["card/0"]):
        time.sleep(0.02)
    server.freeze()
    words, seconds = sentence(finish(first[:1], timeout=60)[0])
    first[1].communicate()
    assert f"the store of the run at 127.0.0.1:{server.port} has not answered for" in words
    assert seconds < PATIENCE + MARGIN


def test_a_store_that_freezes_with_a_neighbour(server: Server) -> None:
    """Neither the reason of a failure can be read then, nor told."""
    processes = start([WORKER, "freezing", str(PATIENCE), str(server.process.pid)], 3, server.port)
    found = [sentence(finish([processes[rank]], timeout=60)[0]) for rank in (0, 2)]
    processes[1].kill()
    processes[1].communicate()
    assert all("stage 1" in words for words, _ in found), found
    assert any("timed out after 3 s waiting to receive" in words for words, _ in found), found
    assert all(seconds < PATIENCE + MARGIN for _, seconds in found), found


def test_calls_of_a_frozen_store_end_in_time(server: Server) -> None:
    store = SharedStore(client(server.port), 0.5, "the store")
    store.set("a", "b")
    store.set_first("a", "c")
    assert store.words("a") == ["b"]
    assert store.words("a", "d") is None
    assert store.has("a")
    server.freeze()
    begin = time.monotonic()
    with pytest.raises(PipelineError, match=r"^the store has not answered for 0.5 s; check the link to the machine"):
        store.has("a")
    world = World(0, 2, 60.0, store)
    assert world.reason() is None
    world.tell("nobody hears this")
    assert time.monotonic() - begin < 12.0, "a lost store is asked only once"


def test_a_store_that_is_gone_is_named(server: Server) -> None:
    store = SharedStore(client(server.port), 5.0, "the store")
    server.process.kill()
    server.process.wait()
    with pytest.raises(PipelineError, match=r"^the store cannot be reached \("):
        store.words("a")


def test_an_answer_is_the_calls_result_or_error() -> None:
    assert Answer(lambda: 3).get(5.0) == 3
    with pytest.raises(ZeroDivisionError):
        Answer(lambda: 1 // 0).get(5.0)
    slow = Answer(lambda: time.sleep(0.3))
    assert not slow.ready
    with pytest.raises(TimeoutError, match=r"no answer after 0.01 s"):
        slow.get(0.01)
    slow.get(5.0)
    assert slow.ready
