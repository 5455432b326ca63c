"""``train`` with its processes on hosts of their own: slow links choose the slack, and outages change nothing."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from launch import finish

from benchmarks.hosts import Hosts, address, missing
from nesterov_pp.cli import main
from nesterov_pp.training.metrics import microbatches_done

pytestmark = [pytest.mark.network, pytest.mark.usefixtures("one_thread")]

SMALL = ["--layers", "2", "--width", "16", "--heads", "2", "--context", "16", "--batch", "4", "--eval-batches", "2"]


@pytest.fixture(autouse=True)
def _hosts_can_be_made() -> None:
    if why := missing():
        pytest.skip(f"no hosts can be made on this machine: {why}")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 400)
    return path


class Run:
    """``train`` on two hosts; with ``torchrun``, started by one on each."""

    def __init__(self, hosts: Hosts, text: Path, out: Path, *more: str, torchrun: Sequence[str] | None = None) -> None:
        self.out, self.flags = out, ["--data", str(text), *SMALL, *more]
        train = ["-m", "nesterov_pp", "train", *self.flags, "--out", str(out)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.processes = []
        for k in range(len(hosts.names)):
            launcher = ["-m", "torch.distributed.run", "--nnodes", str(len(hosts.names)), "--nproc-per-node", "1"]
            launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address(0)}:29400", "--local-addr", address(k)]
            launcher += ["--rdzv-conf", f"is_host={str(k == 0).lower()},join_timeout=600,read_timeout=600"]
            launcher += torchrun or ()
            command = train if torchrun is None else [*launcher, *train]
            self.processes.append(hosts.start(k, command, **pipes))

    def reach(self, count: int) -> None:
        end = time.monotonic() + 120
        while microbatches_done(self.out / "metrics.jsonl") < count:
            assert time.monotonic() < end
            assert all(process.poll() is None for process in self.processes), finish(self.processes, 10)
            time.sleep(0.05)

    def ended(self, seconds: float = 180) -> list[tuple[int, str]]:
        return finish(self.processes, seconds)

    @property
    def slack(self) -> int:
        return int(json.loads((self.out / "config.json").read_text())["config"]["slack"])

    def is_undisturbed(self, folder: Path) -> None:
        """Check that the run ended, with the bytes of the same one in one process."""
        for status, output in self.ended():
            assert status == 0, output
        flags = [*self.flags, "--stages", "2", "--slack", str(self.slack), "--out", str(folder)]
        assert main(["train", *flags]) == 0
        assert (self.out / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


@pytest.fixture
def slow_hosts() -> Iterator[Hosts]:
    with Hosts(2, latency=0.02, bandwidth=100e6 / 8) as hosts:
        yield hosts


def test_slow_links_choose_the_slack(slow_hosts: Hosts, text: Path, tmp_path: Path) -> None:
    run = Run(slow_hosts, text, tmp_path / "run", "--microbatches", "60")
    run.is_undisturbed(tmp_path / "one")
    assert run.slack > 0


def test_fast_links_and_one_process_need_none(text: Path, tmp_path: Path) -> None:
    with Hosts(2) as hosts:
        run = Run(hosts, text, tmp_path / "run", "--microbatches", "20")
        run.is_undisturbed(tmp_path / "one")
    assert run.slack == 0
    flags = ["--data", str(text), *SMALL, "--stages", "2", "--microbatches", "4", "--slack", "auto"]
    assert main(["train", *flags, "--out", str(tmp_path / "auto")]) == 0
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["config"]["slack"] == 0


@pytest.mark.slow
def test_a_link_that_is_down_for_five_seconds(slow_hosts: Hosts, text: Path, tmp_path: Path) -> None:
    run = Run(slow_hosts, text, tmp_path / "run", "--microbatches", "400")
    run.reach(40)
    with slow_hosts.without(1):
        time.sleep(5.0)
        stood = microbatches_done(run.out / "metrics.jsonl")
    assert stood < 400
    run.is_undisturbed(tmp_path / "one")


@pytest.mark.slow
def test_a_link_that_is_down_for_longer_than_the_timeout(slow_hosts: Hosts, text: Path, tmp_path: Path) -> None:
    run = Run(slow_hosts, text, tmp_path / "run", "--microbatches", "3000", "--timeout", "4")
    run.reach(40)
    with slow_hosts.without(1):
        ended = run.ended(60)
    for status, output in ended:
        assert status == 1
        assert output.splitlines()[-1].startswith("nesterov_pp: error: "), output


@pytest.mark.slow
def test_torchrun_goes_on_from_the_checkpoint(slow_hosts: Hosts, text: Path, tmp_path: Path) -> None:
    more = ["--microbatches", "600", "--timeout", "4", "--checkpoint-every", "20"]
    run = Run(slow_hosts, text, tmp_path / "run", *more, torchrun=["--max-restarts", "3"])
    run.reach(60)
    with slow_hosts.without(1):
        time.sleep(10.0)
    run.is_undisturbed(tmp_path / "one")
