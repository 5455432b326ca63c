"""Output for terminals of any width and encoding: figures are never cut, and what has no room is stacked."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from itertools import chain

from rich import table
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

_PLAIN_WIDTH = 120


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # for the command line, which has an exit status for it


def make_console() -> Console:
    """Return a console on standard output, wide enough for the tables where neither that nor ``COLUMNS`` says how."""
    fixed = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return _Console(width=_PLAIN_WIDTH if fixed else None, highlight=False)


def say(console: Console, sentence: str) -> None:
    """Print a sentence. On a terminal it is broken between words only: a path stays whole, so that it can be copied."""
    if console.is_terminal or "COLUMNS" in os.environ:
        sentence = textwrap.fill(sentence, console.width, break_long_words=False, break_on_hyphens=False)
    console.print(sentence, soft_wrap=True, markup=False)


class Table(table.Table):
    """A table of strings that is printed as a list, one line for each cell, where its columns have no room.

    Headings and the cells of left-justified columns are broken between words; figures (right-justified columns) and
    columns with ``no_wrap`` are never broken.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ranges = [self._widths(column) for column in self.columns]
        room = options.max_width - sum(1 + self.padding[1] + self.padding[3] for _ in ranges) - 1
        if sum(least for least, _ in ranges) > room:
            yield from self._stacked()
            return
        for column, width in zip(self.columns, _shares(ranges, room), strict=True):
            column.width = width
        yield from super().__rich_console__(console, options)

    def _widths(self, column: table.Column) -> tuple[int, int]:
        """Return the least width of a column, and the width at which nothing in it is broken."""
        heading, cells = str(column.header), [str(cell) for cell in column._cells]
        breaks = column.justify == "left" and not column.no_wrap
        words = chain(heading.split(), *(cell.split() if breaks else [cell] for cell in cells))
        return max(map(cell_len, words), default=0), max(map(cell_len, [heading, *cells]))

    def _stacked(self) -> RenderResult:
        yield Text(str(self.title or ""), style="italic")
        for row in zip(*(column._cells for column in self.columns), strict=True):
            yield Text()
            for column, cell in zip(self.columns, row, strict=True):
                yield Text(f"{column.header}: {cell}", overflow="fold")


def _shares(ranges: Sequence[tuple[int, int]], room: int) -> list[int]:
    """Return a width for each column: its least one, and then as much as all can have alike, up to what it needs."""
    level = max(most for _, most in ranges)
    while (widths := [min(most, max(least, level)) for least, most in ranges]) and sum(widths) > room:
        level -= 1
    return widths
