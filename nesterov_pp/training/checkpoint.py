"""Checkpoints of a run, and other files written in the same atomic way, with errors for the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from nesterov_pp.pipeline import checkpoints as files
from nesterov_pp.pipeline.checkpoints import checkpoints, microbatch_of, newest, newest_complete, stage_part
from nesterov_pp.training.config import RunError, UserError

__all__ = [
    "checkpoints",
    "load",
    "microbatch_of",
    "newest",
    "newest_complete",
    "save",
    "stage_part",
    "write_atomic",
    "write_text",
    "writing",
]


@contextmanager
def _as_run_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(str(error)) from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise RunError, which names the file, for a write in the block that fails (the disk is full, ...)."""
    with _as_run_error(), files.naming(path):
        yield


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that ``path`` is the old file or the complete new one at any moment, even after a power cut.

    Raises:
        RunError: the file cannot be written (the disk is full, ...); ``path`` is left as it was.
    """
    with _as_run_error():
        files.write_atomic(path, write)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8 with ``write_atomic``."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))


def save(folder: Path, microbatch: int, state: dict[str, Any], *, part: str = "", certain: int | None = None) -> None:
    """Write the checkpoint after ``microbatch`` microbatches and delete old ones, as ``pipeline.checkpoints.write``.

    Raises:
        RunError: the checkpoint cannot be written; the older ones are kept.
    """
    with _as_run_error():
        files.write(folder, microbatch, state, part=part, certain=certain)


def load(path: Path) -> dict[str, Any]:
    """Return what ``save`` wrote, including ``microbatch``. No code in the file is executed.

    Raises:
        UserError: the file is truncated, damaged, not a checkpoint, or one of another version.
    """
    try:
        return files.read(path, resume="--resume")
    except ValueError as error:
        raise UserError(str(error)) from None
