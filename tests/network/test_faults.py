"""Pipelines whose stages are on hosts of their own, over links that are slow, lossy, interrupted or gone."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launch import ROOT, finish
from torch.nn import functional as F
from toy import microbatch, model

from benchmarks.hosts import Hosts, missing
from nesterov_pp.pipeline import VirtualPipeline

pytestmark = [pytest.mark.network, pytest.mark.usefixtures("one_thread")]

WORKER = str(ROOT / "tests" / "network_worker.py")
TIMEOUT = 5.0


@pytest.fixture(autouse=True)
def _hosts_can_be_made() -> None:
    if why := missing():
        pytest.skip(f"no hosts can be made on this machine: {why}")


class Run:
    """A run of one process a host, which tells how far it is."""

    def __init__(
        self, hosts: Hosts, folder: Path, microbatches: int, slack: int, seconds: Callable[[int], float]
    ) -> None:
        self.folder, self.microbatches, self.slack = folder, microbatches, slack
        self.stages = len(hosts.names)
        words = [str(folder), str(microbatches), str(slack), str(TIMEOUT)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.processes = [hosts.start(k, [WORKER, *words, str(seconds(k))], **pipes) for k in range(self.stages)]

    def done(self, rank: int) -> list[str]:
        path = self.folder / f"{rank}.txt"
        return path.read_text().splitlines() if path.exists() else []

    def reach(self, count: int) -> None:
        """Wait until the last stage has completed so many microbatches."""
        end = time.monotonic() + 60
        while len(self.done(self.stages - 1)) < count:
            assert time.monotonic() < end, self.ended()
            time.sleep(0.02)

    def ended(self) -> list[tuple[int, str]]:
        return finish(self.processes, timeout=90)

    def goes_on(self) -> None:
        """Check that the run ends with the losses of the virtual pipeline."""
        outputs = self.ended()
        assert [status for status, _ in outputs] == [0] * self.stages, outputs
        pipe = VirtualPipeline(model(self.stages, dtype=torch.float32), F.cross_entropy, lr=3e-3, slack=self.slack)
        losses = [float(pipe.step(*microbatch(m))) for m in range(self.microbatches)]
        assert list(map(float, self.done(self.stages - 1))) == losses


def quick(_: int) -> float:
    return 0.005


@pytest.mark.parametrize("slack", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_link_that_comes_back_and_loses_packets(tmp_path: Path, slack: int) -> None:
    with Hosts(3, latency=0.01, bandwidth=10e6) as hosts:
        run = Run(hosts, tmp_path, 80, slack, quick)
        run.reach(20)
        with hosts.without(1):
            time.sleep(2.0)
            stood = len(run.done(2))
            time.sleep(0.5)
            assert len(run.done(2)) == stood, "the link is not down"
        hosts.lose(1.0)
        run.goes_on()


@pytest.mark.parametrize(("slack", "host"), [(0, 0), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_a_link_that_is_gone_ends_every_process(tmp_path: Path, slack: int, host: int) -> None:
    """Also those that can no longer reach the store, which is on the first host."""
    with Hosts(3, latency=0.01) as hosts:
        run = Run(hosts, tmp_path, 2000, slack, quick)
        run.reach(20)
        with hosts.without(host):
            outputs = run.ended()
    assert [status for status, _ in outputs] == [1, 1, 1], outputs
    for _, output in outputs:
        (line,) = [row for row in output.splitlines() if re.search(r"^PipelineError: .* ?\[[\d.]+ s\]$", row)]
        assert re.search("timed out after 5 s waiting to|because another process stopped|that process has ended", line)
        assert float(line.split("[")[-1].split()[0]) < 3 * TIMEOUT, "of which a busy machine takes its part"
    assert any("timed out after 5 s waiting to" in output for _, output in outputs), outputs


def test_a_host_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    with Hosts(2) as hosts, hosts.without(1):
        outputs = Run(hosts, tmp_path, 10, 0, quick).ended()
    assert [status for status, _ in outputs] == [1, 1]
    assert "process 0 timed out after 5 s waiting for process 1 of 2" in outputs[0][1]
    assert "process 1 of 2 found no process at 10.88.0.1:29500 within 5 s" in outputs[1][1]


def test_one_host_ten_times_slower(tmp_path: Path) -> None:
    with Hosts(3) as hosts:
        Run(hosts, tmp_path, 30, 2, lambda rank: 0.05 if rank == 1 else 0.005).goes_on()
