"""Swarms of real processes: what they train is what their traces say, bit for bit, however their workers die."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchft")

from benchmarks.swarm import Swarm, command, swarm
from nesterov_pp.cli import main

SMALL = ["--layers", "2", "--width", "16", "--heads", "2", "--context", "16", "--batch", "2", "--lr", "1e-3"]


def _until(s: Swarm, holds: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert s.coordinator.poll() is None, (s.logs / "coordinator.txt").read_text()[-2000:]
        assert time.monotonic() < until, (s.logs / "coordinator.txt").read_text()[-2000:]
        time.sleep(0.05)


def _counted(out: Path) -> list[list[int]]:
    """Return the microbatches that each stage has counted in its last line of versions."""
    rows = [json.loads(line) for line in (out / "trace.jsonl").read_bytes().split(b"\n")[:-1]]
    updates: dict[str, dict[str, Any]] = {row["update"]["version"]: row["update"] for row in rows if "update" in row}
    heads = {update["stage"]: version for version, update in updates.items()}
    found = []
    for stage in sorted(heads):
        version, counted = heads[stage], []
        while version in updates:
            counted += [one["m"] for bundle in updates[version]["bundles"] for one in bundle]
            version = updates[version]["parent"]
        found.append(sorted(counted))
    return found


def test_one_worker_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with swarm(tmp_path / "run", 2, "--method", "nesterov", "--microbatches", "40", *SMALL) as s:
        s.wait_ready([s.join(1), s.join(2)])
        last = s.finish(60.0)
    assert "0 gradients lost, 0 counted twice, 0 microbatches sent again" in last
    assert _counted(tmp_path / "run") == [list(range(40))] * 2
    threads = torch.get_num_threads()
    try:
        for what, said in ((["swarm", "replay"], "bit for bit"), (["swarm", "picture"], "timeline.png")):
            assert main([*what, str(tmp_path / "run")]) == 0
            assert said in capsys.readouterr().out
        assert main(["generate", str(tmp_path / "run"), "--length", "5"]) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_peer_finishes_what_a_killed_worker_held(tmp_path: Path, stage: int) -> None:
    """The second stage sets the pace: the workers of the first one hold microbatches, those of the second have some."""
    with swarm(tmp_path / "run", 2, "--method", "nesterov", "--microbatches", "60", *SMALL) as s:
        teams = {1: [s.join(1), s.join(1)], 2: [s.join(2, slow=12.0), s.join(2, slow=12.0)]}
        s.wait_ready([*teams[1], *teams[2]])
        _until(s, lambda: s.updates() > 20)
        s.kill(teams[stage][0])
        last = s.finish(60.0)
        taken, joined = s.events("taken over"), s.events("joined")
    named = {event["address"]: event["worker"] for event in joined}
    dead, peer = (named[address] for address in teams[stage])
    assert {(event["of"], event["worker"]) for event in taken} == {(dead, peer)}
    assert "0 gradients lost, 0 counted twice, " in last
    assert f"{len(taken)} taken over by a peer" in last
    assert "bit for bit" in command("replay", str(tmp_path / "run"))
    assert _counted(tmp_path / "run") == [list(range(60))] * 2
    if stage == 1:
        # The second stage has what the dead worker had sent; its version is in the peer's ring.
        assert all(event["version"] == event["before"] for event in taken if event["before"] is not None)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["swarm", "nesterov", "nesterov-rotated"])
def test_kills_and_joins(tmp_path: Path, method: str) -> None:
    with swarm(tmp_path / "run", 2, "--method", method, "--microbatches", "500", *SMALL) as s:
        first = [s.join(1, slow=8.0) for _ in range(2)]
        second = [s.join(2, slow=8.0) for _ in range(2)]
        s.wait_ready([*first, *second])
        _until(s, lambda: s.updates() > 40)
        s.kill(first[0])
        before = s.updates()
        _until(s, lambda: s.updates() > before + 40)
        s.wait_ready([s.join(1, slow=8.0)])
        s.kill(second[1])
        before = s.updates()
        _until(s, lambda: s.updates() > before + 40)
        s.kill(first[1])
        last = s.finish(120.0)
    assert "0 gradients lost" in last
    assert "bit for bit" in command("replay", str(tmp_path / "run"))
    assert [set(stage) for stage in _counted(tmp_path / "run")] == [set(range(500))] * 2


@pytest.mark.slow
def test_a_stage_without_workers_waits_and_goes_on(tmp_path: Path) -> None:
    more = ["--microbatches", "200", "--checkpoint-every", "10"]
    with swarm(tmp_path / "run", 2, *more, *SMALL) as s:
        only, other = s.join(1, slow=8.0), s.join(2, slow=8.0)
        s.wait_ready([only, other])
        _until(s, lambda: s.updates() > 60)
        s.kill(only)
        log = s.logs / "coordinator.txt"
        _until(s, lambda: "waiting for a worker of stage 1" in log.read_text().splitlines()[-1])
        s.join(1)
        s.finish(60.0)
        # From a checkpoint, which may be the newest version.
        assert re.search(r"s0w1 has version [1-9]\d* of stage 1", log.read_text())
    assert "bit for bit" in command("replay", str(tmp_path / "run"))
    assert [set(stage) for stage in _counted(tmp_path / "run")] == [set(range(200))] * 2


@pytest.mark.slow
def test_the_coordinator_dies_and_goes_on(tmp_path: Path) -> None:
    with swarm(tmp_path / "run", 2, "--method", "nesterov", "--microbatches", "300", *SMALL) as s:
        s.wait_ready([s.join(1, slow=8.0), s.join(1, slow=8.0), s.join(2, slow=8.0)])
        _until(s, lambda: s.updates() > 60)
        s.coordinator.kill()
        s.coordinator.wait()
        time.sleep(1.0)
        assert all(process.poll() is None for _, process, *_ in s.workers.values())
        s.again()
        last = s.finish(120.0)
    assert "0 gradients lost" in last
    assert "bit for bit" in command("replay", str(tmp_path / "run"))
    assert [set(stage) for stage in _counted(tmp_path / "run")] == [set(range(300))] * 2


def test_mistakes_are_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        try:
            status = main(["swarm", *arguments])
        except SystemExit as error:  # a malformed flag
            status = int(error.code or 0)
        out, err = capsys.readouterr()
        assert status in (1, 2)
        assert out == ""
        assert err.count("\n") == 1, err
        return err

    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef")
    secret.chmod(0o644)
    join = ["work", "--join", "127.0.0.1:1", "--patience", "0.1", "--token-file", str(secret)]
    assert "others can read the secret" in refused(*join)
    secret.chmod(0o600)
    assert "no coordinator at 127.0.0.1:1" in refused(*join)
    secret.write_text("short")
    assert "at least 16 characters" in refused(*join)
    assert "HOST:PORT" in refused("work", "--join", "nowhere")
    secret.write_text("0123456789abcdef")
    out = ["--out", str(tmp_path / "run"), "--token-file", str(secret)]
    assert "waits for its gradients" in refused("coordinate", "--method", "gpipe", *out)
    assert "predicts weights" in refused("coordinate", "--method", "xpipe", *out)
    assert not (tmp_path / "run" / "trace.jsonl").exists()
    assert "cannot be read" in refused("replay", str(tmp_path))
    assert "cannot be read" in refused("picture", str(tmp_path))
