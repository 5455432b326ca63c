"""Tables and sentences in terminals of any width and encoding: no figure is cut or broken."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from nesterov_pp.terminal import Table, make_console, say

FIGURES = ["1.7485", "1.749 1.750 1.747", "11,581", "100.0 %", "390.8 MiB"]


def table() -> Table:
    made = Table(title="Comparison")
    made.add_column("Method", no_wrap=True)
    for heading in ("Validation loss", "Each seed", "Tokens/s", "Optimizer time", "Peak memory"):
        made.add_column(heading, justify="right")
    made.add_column("Description")
    made.add_row("nesterov-rotated", *FIGURES, "in the eigenbasis of the gradients")
    return made


def printed(width: int, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=file, width=width).print(table())
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_figure_is_cut_or_broken(width: int, encoding: str) -> None:
    lines = printed(width, encoding).splitlines()
    assert max(map(len, lines)) <= width
    for figure in ["nesterov-rotated", *FIGURES]:
        if width >= 40:
            assert any(figure in line for line in lines), figure
    assert "…" not in "".join(lines)


def test_what_has_no_room_is_stacked() -> None:
    assert "│" in printed(120)
    narrow = printed(40).splitlines()
    assert "│" not in "".join(narrow)
    assert "Tokens/s: 11,581" in [line.rstrip() for line in narrow]


def test_headings_and_prose_are_broken_before_figures_are_stacked() -> None:
    whole = len(printed(300).splitlines()[2].rstrip())
    lines = printed(whole - 30).splitlines()
    assert any("│" in line for line in lines)
    assert any("1.749 1.750 1.747" in line for line in lines)


def test_ascii_gets_ascii() -> None:
    assert printed(120, "ascii").isascii()
    assert not printed(120).isascii()


def test_sentences_are_broken_between_words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/a-long-path/" + "of-many-words/" * 4
    monkeypatch.setenv("COLUMNS", "30")
    with (console := make_console()).capture() as seen:
        say(console, f"Validation loss: [0.044] below gpipe, written to {path} and read again.")
    lines = seen.get().splitlines()
    assert path in lines
    assert all(len(line) <= 30 for line in lines if line != path)
    assert "[0.044]" in seen.get()


def test_elsewhere_a_sentence_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    with (console := make_console()).capture() as seen:
        say(console, "word " * 100)
    assert seen.get().count("\n") == 1
