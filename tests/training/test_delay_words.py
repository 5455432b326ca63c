"""Delay models written in words, and runs with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nesterov_pp.cli import main
from nesterov_pp.pipeline import DropOuts, Fixed, Geometric, Stragglers, Trace, Uniform, find_recipe
from nesterov_pp.training.delay_words import read_delays

OWN = Fixed([2, 1, 0])


def delays(words: str):
    return read_delays(words, find_recipe("nesterov"), 3, 1, 5)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("own", OWN),
        ("4", Fixed([4, 4, 4])),
        ("4,0,1", Fixed([4, 0, 1])),
        ("uniform:1-3", Uniform([1, 1, 1], [3, 3, 3], 5)),
        ("uniform:1-3,0-2,0-0", Uniform([1, 0, 0], [3, 2, 0], 5)),
        ("geometric:2.5,1,0", Geometric([2.5, 1.0, 0.0], [10, 4, 0], 5)),
        ("own+dropouts:0.25", DropOuts(OWN, 0.25, 5)),
        ("own+stragglers:0.5:7+dropouts:0.25", DropOuts(Stragglers(OWN, 0.5, 7, 5), 0.25, 5)),
    ],
)
def test_words_are_delays(words, expected):
    assert delays(words) == expected


def test_a_trace_is_read(tmp_path):
    path = tmp_path / "a+b:c.txt"
    path.write_text("2, 1, 0\n-\n")
    assert delays(f"trace:{path}+dropouts:0.5") == DropOuts(Trace([[2, 1, 0], None]), 0.5, 5)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "delays must be given as own, 3,2,1,0, uniform:0-4"),
        ("often", "not 'often'"),
        ("uniform:3", "not 'uniform:3'"),
        ("uniform:3-1", "uniform delays need low <= high"),
        ("geometric:-1", "geometric delays need a mean of at least 0"),
        ("1,2", "delays need one entry, or one for each of the 3 stages, not 2"),
        ("-1", "a delay must be a whole number of at least 0"),
        ("own+stragglers:0.5", "not 'own.stragglers:0.5'"),
        ("own+stragglers:0.5:1.5", "not 'own.stragglers:0.5:1.5'"),
        ("own+dropouts:2", "a probability must be from 0 to 1, not 2"),
        ("own+lost:2", "not 'own.lost:2'"),
    ],
)
def test_other_words_are_refused(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        delays(words)


def test_a_run_has_the_delays_that_it_is_given(tiny: list[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("0 0\n3 1\n-\n1 0\n")
    flags = ["--method", "dc-asgd", "--delays", f"trace:{trace}+stragglers:0.2:2", "--sample-length", "0"]
    for name in ("whole", "plain"):
        given = flags if name == "whole" else flags[:2]
        assert main(["train", *tiny, *given, "--microbatches", "60", "--out", str(tmp_path / name)]) == 0
    whole, plain = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "plain"))
    assert whole[0] == plain[0], "nothing is late in the first microbatch"
    assert whole != plain


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--delays", "uniform:x"], "delays must be given as own"),
        (["--delays", "trace:nowhere.txt"], "nowhere.txt cannot be read: No such file"),
        (["--delays", "2", "--method", "gpipe"], "'gpipe' waits for its gradients, so it takes no delays"),
    ],
)
def test_a_run_that_cannot_be_is_not_begun(tiny, tmp_path, capsys, flags, sentence):
    assert main(["train", *tiny, *flags, "--out", str(tmp_path / "run")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
