"""``python -m nesterov_pp analyze``."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from nesterov_pp.analysis import delays, linear_rule, max_mean_square_step, max_stable_step, noise_cosine
from nesterov_pp.cli import main


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "delays.txt").write_text("3 5, 5\n8\n")
    (tmp_path / "words.txt").write_text("3 five")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(printed: str) -> list[list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def test_it_prints_what_the_functions_give_and_writes_a_plot(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--delay", "3", "--momentum", "0.9", "--horizon", "2", "--random", "trace:delays.txt,uniform:0:6"]
    assert main(["analyze", *given, "--step", "0.2", "--out", "deep/plot.png"]) == 0
    printed = capsys.readouterr().out
    table = rows(printed)
    steps = {(row[0], row[1]): row[2] for row in table if len(row) == 7}
    for rule, horizon in [("sgd", ""), ("ema", "0"), ("nag", "1"), ("nag", "2"), ("nag", "3")]:
        ahead = float(horizon) if rule == "nag" else None
        edge = max_stable_step(rule, momentum=0.9, delay=3, horizon=ahead)
        assert float(steps[rule, horizon]) == pytest.approx(edge, rel=5e-3)
    trace = delays.trace([3, 5, 5, 8])
    (row,) = [row for row in table if row[0] == "trace of 4" and len(row) == 6]
    assert float(row[4]) == pytest.approx(max_stable_step("sgd", delay=trace), rel=5e-3)
    assert float(row[5]) == pytest.approx(max_mean_square_step("sgd", delay=trace), rel=5e-3)
    assert ["fixed 3", "underdamped"] in [row[:2] for row in table]
    (cosine,) = [row[6] for row in table if row[:2] == ["nag", "2"]]
    assert float(cosine) == pytest.approx(noise_cosine(linear_rule("nag", momentum=0.9, horizon=2.0), 3), abs=5e-3)
    assert re.search(r"at most 0\.125 ", printed)
    with Image.open(place / "deep" / "plot.png") as plot:
        assert plot.size == (1560, 1170)


@pytest.mark.slow
def test_a_real_process_has_defaults_for_the_rest(place: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "nesterov_pp", "analyze", "--delay", "2"],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    for part in (
        "late by 2 updates, momentum 0.99",
        "uniform 0 to 4",
        "geometric, mean 2",
        "The plot is in runs/analysis.png.",
    ):
        assert part in result.stdout
    assert (place / "runs" / "analysis.png").stat().st_size > 10_000


BAD = [
    ("--delay 0", "argument --delay: needs a whole number from 1 to 64, not '0'"),
    ("--delay 65", "argument --delay: needs a whole number from 1 to 64"),
    ("--delay 2.5", "argument --delay"),
    ("--momentum 1", "argument --momentum: needs a number from 1e-6 to 1 - 1e-6, not '1'"),
    ("--momentum nan", "argument --momentum"),
    ("--horizon -1", "argument --horizon: needs a number from 0 to 1e6, not '-1'"),
    ("--step 0", "argument --step: needs a number from 1e-6 to 1e6, not '0'"),
    ("--step inf", "argument --step"),
    ("--random normal:3", "needs uniform:LOW:HIGH, geometric:MEAN, gamma:MEAN:SHAPE or trace:FILE, not 'normal:3'"),
    ("--random uniform:0:6,", "argument --random: needs uniform:LOW:HIGH"),
    ("--random uniform:6:0", "'uniform:6:0': a uniform delay needs whole numbers with 0 <= low <= high"),
    ("--random uniform:0:2000", "'uniform:0:2000': a uniform delay needs whole numbers with 0 <= low <= high"),
    ("--random uniform:a:2", "'uniform:a:2': 'a' is not a whole number"),
    ("--random geometric:x", "'geometric:x': 'x' is not a number"),
    ("--random gamma:3:0", "a shape of at least 1"),
    ("--random trace:nowhere.txt", "'trace:nowhere.txt': the file cannot be read (No such file or directory)"),
    ("--random trace:words.txt", "'five' is not a whole number"),
    ("--random trace:empty.txt", "a trace must hold at least one delay"),
    ("--out plot.pdf", "--out plot.pdf cannot be used for the plot; give the name of a .png file"),
    ("--out folder.png", "--out folder.png cannot be used for the plot"),
    ("--out delays.txt/plot.png", "--out delays.txt cannot be created: "),
    ("--tau 3", "unrecognized arguments: --tau 3"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_bad_input_is_one_sentence(place: Path, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    before = sorted(place.rglob("*"))
    try:
        status = main(["analyze", *line.split()])
    except SystemExit as exit_:  # argparse
        status = int(exit_.code or 0)
    printed = capsys.readouterr()
    assert status == 2
    (sentence,) = printed.err.splitlines()
    assert sentence.startswith("nesterov_pp: error: ")
    assert message in sentence
    assert printed.out == ""
    assert sorted(place.rglob("*")) == before


def test_without_scipy_it_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "scipy" else find_spec(name))
    assert main(["analyze"]) == 2
    assert "needs scipy; run `pip install 'nesterov-pp[analysis]'`" in capsys.readouterr().err
