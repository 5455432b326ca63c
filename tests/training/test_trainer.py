"""A run in this process: its files, its end, and how it resumes bit for bit."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nesterov_pp.pipeline import VirtualPipeline
from nesterov_pp.training import checkpoint, report
from nesterov_pp.training.config import RunError, UserError
from nesterov_pp.training.metrics import MetricsLog, read_curves
from nesterov_pp.training.sample import generate, printable
from nesterov_pp.training.signals import InterruptionError, StopRequest
from nesterov_pp.training.trainer import train

Given = dict[str, Any]


@pytest.fixture
def given(text_file: Path) -> Given:
    """Return the settings of a run that takes less than a second."""
    model: Given = {"stages": 3, "layers": 3, "width": 16, "heads": 2, "context": 16, "batch": 4}
    run: Given = {"microbatches": 60, "warmup": 5, "eval_every": 7, "eval_batches": 2, "sample_length": 8}
    return {"data": str(text_file), **model, **run}


def stop_after(monkeypatch: pytest.MonkeyPatch, microbatch: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal when a microbatch's line is written."""
    write = MetricsLog.write

    def write_and_signal(self: MetricsLog, **values: float) -> None:
        write(self, **values)
        if values["microbatch"] == microbatch and "loss" in values:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricsLog, "write", write_and_signal)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_leaves_its_results(given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "run"
    train(given, out)
    curves = read_curves(out / "metrics.jsonl")
    assert len(curves.train) == 60
    assert [m for m, _ in curves.validation] == [*range(7, 60, 7), 60]
    assert curves.validation[-1][1] < curves.validation[0][1] < math.log(256) + 0.1
    summary = json.loads((out / "summary.json").read_text())
    assert summary["validation_loss"] == curves.validation[-1][1]
    assert summary["delays"] == [2, 1, 0]
    assert 0.0 < summary["optimizer_share"] < 1.0
    assert summary["peak_memory"] > 50 * 2**20
    with Image.open(out / "loss.png") as plot:
        assert plot.size == (1200, 750)
    assert len((out / "sample.txt").read_text()) >= 16
    printed = capsys.readouterr().out
    for part in ("stash", "Delays of the stages, in updates: 2 1 0", "tokens/s", "ETA", "Perplexity", "Peak memory"):
        assert part in printed


@pytest.mark.parametrize("low", [False, True])
def test_the_memory_line_is_exact(given: Given, tmp_path: Path, low: bool, capsys: pytest.CaptureFixture[str]) -> None:
    train({**given, **({"weights_dtype": "bfloat16", "master_weights": True} if low else {})}, tmp_path)
    state = checkpoint.load(checkpoint.checkpoints(tmp_path)[-1])
    stashes = [stage["stash"]["weights"] for stage in state["pipeline"]["stages"].values()]

    def size(version: dict[str, torch.Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in version.values())

    memory = json.loads((tmp_path / "summary.json").read_text())["pipeline_memory"]
    assert memory["weights"] == sum(size(versions[-1]) for versions in stashes)
    assert memory["stash"] == sum(size(v) for versions in stashes for v in versions[:-1])
    assert memory["moments"] == (4 if low else 2) * memory["weights"]
    assert memory["masters"] == (2 * memory["weights"] if low else 0)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Memory: "))
    assert line == report.memory_line(memory, [2, 1, 0])
    assert ("masters" in line) == low


def test_tensorboard_has_the_same_losses(given: Given, tmp_path: Path) -> None:
    train(given, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    curves = read_curves(tmp_path / "metrics.jsonl")
    train_points = {e.step: e.value for e in events.Scalars("loss/train")}
    assert train_points == pytest.approx({m: curves.train[m - 1] for m in range(10, 61, 10)})
    validation_points = {e.step: e.value for e in events.Scalars("loss/validation")}
    assert validation_points == pytest.approx(dict(curves.validation))


@pytest.mark.parametrize("method", ["nesterov", "nesterov-no-stash", "pipedream-lr", "gpipe"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, number: int
) -> None:
    given = {**given, "method": method, "dropout": 0.1, "max_grad_norm": 1.0, "flush_every": 11}
    train(given, tmp_path / "undisturbed")
    with monkeypatch.context() as patched:
        stop_after(patched, 25, number)
        with pytest.raises(
            InterruptionError, match="resume with: python -m nesterov_pp train --resume --out"
        ) as stopped:
            train(given, tmp_path / "run")
    assert stopped.value.status == 128 + number
    (saved,) = checkpoint.checkpoints(tmp_path / "run")
    assert checkpoint.load(saved)["microbatch"] == (28 if method == "gpipe" else 25)
    assert not (tmp_path / "run" / "summary.json").exists()
    train({}, tmp_path / "run", resume=True)
    for name in ("metrics.jsonl", "sample.txt"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_two_interruptions_and_lost_lines_leave_no_trace(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**given, "checkpoint_every": 10}
    train(given, tmp_path / "undisturbed")
    for microbatch in (13, 37):
        with monkeypatch.context() as patched:
            stop_after(patched, microbatch)
            with pytest.raises(InterruptionError):
                train(given, tmp_path / "run", resume=True)
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"microbatch": 38, "loss": 0.0, "lr": 0.0}\n{"micro')
    train(given, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        tmp_path / "undisturbed" / "metrics.jsonl"
    ).read_bytes()


def test_a_bpe_run_goes_on_with_its_own_vocabulary(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**given, "tokenizer": "bpe", "vocab_size": 270}
    train(given, tmp_path / "undisturbed")
    with monkeypatch.context() as patched:
        stop_after(patched, 30)
        with pytest.raises(InterruptionError):
            train(given, tmp_path / "run")
    tokenizer = tmp_path / "run" / "tokenizer.json"
    definition = tokenizer.read_text()
    tokenizer.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        train({}, tmp_path / "run", resume=True)
    tokenizer.write_text(definition)
    train({}, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        tmp_path / "undisturbed" / "metrics.jsonl"
    ).read_bytes()


def test_a_run_without_a_checkpoint_begins_again(given: Given, tmp_path: Path) -> None:
    train(given, tmp_path)
    undisturbed = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "summary.json").unlink()
    for path in checkpoint.checkpoints(tmp_path):
        path.unlink()
    train({}, tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == undisturbed


def test_a_finished_run_is_reported_and_not_touched(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(given, tmp_path)
    before = contents(tmp_path)
    capsys.readouterr()
    train({}, tmp_path, resume=True)
    assert contents(tmp_path) == before
    printed = capsys.readouterr().out
    assert "is finished" in printed
    assert "Validation loss" in printed


@pytest.fixture
def stopped(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stop a run at microbatch 25, with a checkpoint at 20, and return its folder."""
    with monkeypatch.context() as patched:
        stop_after(patched, 25)
        with pytest.raises(InterruptionError):
            train({**given, "checkpoint_every": 20}, tmp_path / "run")
    return tmp_path / "run"


def assert_refused(out: Path, given: Given, message: str, *, resume: bool = True) -> None:
    before = contents(out)
    with pytest.raises(UserError, match=message) as refused:
        train(given, out, resume=resume)
    assert refused.value.status == 2
    assert contents(out) == before


def test_a_run_is_not_overwritten(stopped: Path, given: Given) -> None:
    assert_refused(stopped, given, "already holds a run; add --resume", resume=False)


def test_another_configuration_is_refused(stopped: Path) -> None:
    assert_refused(stopped, {"width": 32}, r"this run has --width 16, not 32")
    assert_refused(stopped, {"method": "pipedream"}, r"this run has --method nesterov, not pipedream")


def test_a_checkpoint_of_another_configuration_is_refused(stopped: Path, given: Given, tmp_path: Path) -> None:
    train({**given, "width": 8}, tmp_path / "other")
    (foreign,) = checkpoint.checkpoints(tmp_path / "other")
    foreign.rename(stopped / foreign.name)
    assert_refused(stopped, {}, r"belongs to another configuration \(--width 8, not 16\)")


def test_a_truncated_checkpoint_is_refused_until_it_is_removed(stopped: Path, given: Given, tmp_path: Path) -> None:
    older, newest = checkpoint.checkpoints(stopped)
    os.truncate(newest, newest.stat().st_size // 2)
    assert_refused(stopped, {}, rf"truncated or damaged; remove it, and --resume will continue from {older.name}")
    newest.unlink()
    train({}, stopped, resume=True)
    train(given, tmp_path / "undisturbed")
    assert (stopped / "metrics.jsonl").read_bytes() == (tmp_path / "undisturbed" / "metrics.jsonl").read_bytes()


def test_changed_data_is_refused(stopped: Path, tmp_path: Path, text_file: Path) -> None:
    changed = tmp_path / "changed.txt"
    changed.write_bytes(text_file.read_bytes().replace(b"late", b"soon"))
    assert_refused(stopped, {"data": str(changed)}, "has changed since this run began")


def test_the_same_data_elsewhere_will_do(stopped: Path, tmp_path: Path, text_file: Path) -> None:
    moved = tmp_path / "moved.txt"
    moved.write_bytes(text_file.read_bytes())
    train({"data": str(moved)}, stopped, resume=True)
    assert (stopped / "summary.json").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = VirtualPipeline.step

    def diverging(self: VirtualPipeline, inputs: Any, targets: Any) -> torch.Tensor:
        loss = step(self, inputs, targets)
        return loss * math.nan if self.microbatches == 23 else loss

    monkeypatch.setattr(VirtualPipeline, "step", diverging)
    with pytest.raises(
        RunError, match=r"the loss is nan at microbatch 23; .*checkpoint-000000020\.pt is kept"
    ) as failed:
        train({**given, "checkpoint_every": 10}, tmp_path)
    assert failed.value.status == 1
    assert len(read_curves(tmp_path / "metrics.jsonl").train) == 22
    assert checkpoint.load(checkpoint.checkpoints(tmp_path)[-1])["microbatch"] == 20


def test_every_method_and_depth_sees_the_same_first_loss(given: Given, tmp_path: Path) -> None:
    first = set()
    for method, stages in (("nesterov", 1), ("pipedream", 3), ("gpipe", 2)):
        train({**given, "method": method, "stages": stages, "microbatches": 4}, tmp_path / f"{method}{stages}")
        first.add(read_curves(tmp_path / f"{method}{stages}" / "metrics.jsonl").train[0])
    assert len(first) == 1


def test_the_first_signal_is_noted_and_the_second_acts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is before
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_sample_follows_the_logits() -> None:
    seen = []

    def predict(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens.shape[1])
        following = (tokens + 1) % 5
        return torch.nn.functional.one_hot(following, 5).float() * 50.0

    tokens = generate(predict, torch.tensor([3]), 6, context=4, temperature=0.5, seed=0)
    assert tokens == [4, 0, 1, 2, 3, 4]
    assert seen == [1, 2, 3, 4, 4, 4]


def test_a_sample_depends_on_its_seed_and_temperature() -> None:
    def predict(tokens: torch.Tensor) -> torch.Tensor:
        return torch.linspace(0, 3, 20).expand(1, tokens.shape[1], 20)

    def draw(seed: int, temperature: float) -> list[int]:
        return generate(predict, torch.tensor([0]), 50, context=4, temperature=temperature, seed=seed)

    assert draw(1, 1.0) == draw(1, 1.0)
    assert draw(1, 1.0) != draw(2, 1.0)
    assert set(draw(1, 0.001)) == {19}


def test_a_sample_cannot_steer_the_terminal() -> None:
    assert printable("a\tb\n\x1b[2J\rc\x00é") == "a\tb\n\ufffd[2J\ufffdc\ufffdé"
