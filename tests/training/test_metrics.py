"""The metrics file, and the curves computed from it."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from PIL import Image

from nesterov_pp.training import plots, report, results
from nesterov_pp.training.config import Config, UserError
from nesterov_pp.training.metrics import Curves, MetricsLog, microbatches_done, read_curves


def write(path: Path, first: int, last: int, keep: int = 0) -> int:
    log = MetricsLog(path, keep)
    for m in range(first, last + 1):
        log.write(microbatch=m, loss=1.0 / m, lr=0.1)
    offset = log.sync()
    log.close()
    return offset


def test_a_log_goes_on_where_a_checkpoint_was(tmp_path: Path) -> None:
    path, undisturbed = tmp_path / "metrics.jsonl", tmp_path / "other.jsonl"
    offset = write(path, 1, 7)
    write(path, 8, 12, keep=offset)
    with path.open("ab") as file:
        file.write(b'{"microbatch": 13, "lo')  # a process killed in the middle of a line
    write(path, 8, 20, keep=offset)
    write(undisturbed, 1, 20)
    assert path.read_bytes() == undisturbed.read_bytes()


def test_a_new_run_begins_with_an_empty_log(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", 1, 3)
    write(tmp_path / "metrics.jsonl", 1, 2)
    assert len(read_curves(tmp_path / "metrics.jsonl").train) == 2


def test_a_log_that_lost_lines_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    offset = write(path, 1, 7)
    before = path.read_bytes()[:-1]
    path.write_bytes(before)
    with pytest.raises(UserError, match="has lost lines"):
        MetricsLog(path, offset)
    assert path.read_bytes() == before


def test_losses_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(microbatch=1, loss=0.1 + 0.2, lr=1e-3)
    log.write(microbatch=1, validation_loss=math.pi)
    with pytest.raises(ValueError):
        log.write(microbatch=2, loss=math.nan)
    log.close()
    assert read_curves(path) == Curves([0.1 + 0.2], [(1, math.pi)])


def test_the_last_whole_line_tells_how_far_a_run_is(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert microbatches_done(path) == 0
    path.touch()
    assert microbatches_done(path) == 0
    write(path, 1, 500)
    assert microbatches_done(path) == 500
    with path.open("ab") as file:
        file.write(b'{"microbatch": 501, "l')
    assert microbatches_done(path) == 500
    assert len(read_curves(path).train) == 500


def test_a_damaged_metrics_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("not json\n")
    with pytest.raises(UserError, match="damaged"):
        read_curves(tmp_path / "metrics.jsonl")


def test_the_summary_of_a_run() -> None:
    curves = Curves([9.0] * 50 + [2.0] * 50 + [3.0] * 50, [(100, 5.0), (150, 2.5)])
    summary = report.summarise(
        Config(microbatches=150, batch=4, context=16),
        curves,
        delays=[1, 0],
        memory={"weights": 4, "stash": 4, "moments": 8},
        seconds=3.0,
        optimizer_seconds=0.75,
        peak_memory=2**20,
    )
    assert summary["train_loss"] == 2.5
    assert summary["validation_loss"] == 2.5
    assert summary["perplexity"] == math.exp(2.5)
    assert summary["tokens_per_second"] == 150 * 4 * 16 / 3.0
    assert summary["optimizer_share"] == 0.25


def run(method: str, seed: int, validation: float) -> dict[str, object]:
    return {
        "method": method,
        "seed": seed,
        "validation_loss": validation,
        "train_loss": validation - 0.5,
        "tokens_per_second": 1000.0 + seed,
        "optimizer_share": 0.1,
        "peak_memory": 100 + seed,
    }


def test_a_row_of_a_comparison() -> None:
    row = results.summarise([run("a", 0, 2.0), run("a", 1, 2.5), run("a", 2, 2.1)])
    assert row["validation_losses"] == [2.0, 2.5, 2.1]
    assert row["validation_loss"] == pytest.approx(2.2)
    assert row["spread"] == 0.5
    assert row["perplexity"] == pytest.approx(math.exp(2.2))
    assert row["train_loss"] == pytest.approx(1.7)
    assert row["tokens_per_second"] == 1001.0
    assert row["peak_memory"] == 102


def test_the_comparison_says_what_was_measured_whichever_way_it_falls() -> None:
    a = results.summarise([run("a", 0, 2.0), run("a", 1, 2.25)])
    b = results.summarise([run("b", 0, 3.0), run("b", 1, 3.0)])
    c = results.summarise([run("c", 0, 2.0), run("c", 1, 2.0)])
    assert results.sentence([a, b]) == ("Validation loss: a is 0.875 below b (more than the spread over seeds, 0.250).")
    assert results.sentence([b, a]) == ("Validation loss: b is 0.875 above a (more than the spread over seeds, 0.250).")
    assert results.sentence([a, c]) == (
        "Validation loss: a is 0.125 above c (not more than the spread over seeds, 0.250)."
    )
    assert results.sentence([a]) == ""


def test_the_markdown_table_has_every_method_and_seed() -> None:
    rows = [results.summarise([run(m, s, 2.0 + s) for s in range(3)]) for m in ("a", "b")]
    header, _, *lines = results.markdown(rows, "Conclusion.").splitlines()
    assert header.count("|") == 10
    assert lines[0] == "| a | 3.0000 | 2.000 3.000 4.000 | 2.0000 | 20.09 | 2.5000 | 1,001 | 10.0 % | 102 B |"
    assert lines[1].startswith("| b |")
    assert lines[-1] == "Conclusion."


@pytest.mark.parametrize("length", [1, 30, 1000])
def test_a_run_is_drawn_whatever_its_length(length: int) -> None:
    file = io.BytesIO()
    plots.draw_run(file, Curves([1.0 / m for m in range(1, length + 1)], [(length, 0.5)]), "nesterov")
    assert_drawn(file)


def test_a_comparison_is_drawn() -> None:
    file = io.BytesIO()
    runs = {f"method {k}": [Curves([], [(10, 3.0 + s), (20, 2.0 + k)]) for s in range(3)] for k in range(8)}
    plots.draw_comparison(file, runs)
    assert_drawn(file)


def assert_drawn(file: io.BytesIO) -> None:
    image = Image.open(file).convert("L")
    assert image.size == (1200, 750)
    low, high = image.getextrema()
    assert (low, high) == (0, 255)


@pytest.mark.parametrize(
    ("bytes_", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**20, "5.0 MiB"), (2**31, "2.00 GiB")]
)
def test_sizes_are_for_people(bytes_: int, text: str) -> None:
    assert report.size(bytes_) == text
