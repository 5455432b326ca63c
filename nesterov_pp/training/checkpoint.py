"""Checkpoints that are either complete or absent, and other files written in the same atomic way."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch

from nesterov_pp.training.config import UserError
from nesterov_pp.training.metrics import writing

KEPT = 2
_FAMILY = "nesterov_pp run "
_FORMAT = f"{_FAMILY}1"
_PREFIX = "checkpoint-"
_DIGITS = 9


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that ``path`` is the old file or the complete new one at any moment, even after a power cut.

    Raises:
        RunError: the file cannot be written (the disk is full, ...); ``path`` is left as it was.
    """
    temporary = path.with_name(f".{path.name}.part")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8 with ``write_atomic``."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))


def checkpoints(folder: Path, part: str = "") -> list[Path]:
    """Return the checkpoints in a folder, oldest first: those of one stage's ``part``, or of a whole pipeline ("")."""
    return sorted(folder.glob(f"{_PREFIX}{'[0-9]' * _DIGITS}{part}.pt"))


def stage_part(stage: int, stages: int) -> str:
    """Return the part of a checkpoint's file name that marks one stage (from 0)."""
    return f".stage-{stage + 1}-of-{stages}"


def microbatch_of(path: Path) -> int:
    """Return the number of microbatches done before a checkpoint."""
    return int(path.name[len(_PREFIX) :][:_DIGITS])


def save(folder: Path, microbatch: int, state: dict[str, Any], *, part: str = "", certain: int | None = None) -> None:
    """Write the checkpoint after ``microbatch`` microbatches and delete old ones.

    The newest two complete checkpoints are kept. Where each stage writes its own part, the complete checkpoints are
    those of at most ``certain`` microbatches, which all stages have written.

    Raises:
        RunError: the checkpoint cannot be written; the older ones are kept.
    """
    path = folder / f"{_PREFIX}{microbatch:0{_DIGITS}d}{part}.pt"
    write_atomic(path, lambda file: _serialise({"format": _FORMAT, "microbatch": microbatch, **state}, file))
    certain = microbatch if certain is None else certain
    with writing(folder):
        for old in [p for p in checkpoints(folder, part) if microbatch_of(p) <= certain][:-KEPT]:
            old.unlink()


def _serialise(state: dict[str, Any], file: IO[bytes]) -> None:
    """Write a state with ``torch.save``; raise the ``OSError`` of a failed write, for which torch has another error."""
    failed: list[OSError] = []

    class Watched(io.RawIOBase):
        def write(self, data: Any) -> int:
            try:
                return file.write(data)
            except OSError as error:
                failed.append(error)
                raise

    try:
        torch.save(state, cast(IO[bytes], Watched()))
    except RuntimeError:
        if failed:
            raise failed[0] from None
        raise


def load(path: Path) -> dict[str, Any]:
    """Return what ``save`` wrote, including ``microbatch``. No code in the file is executed.

    Raises:
        UserError: the file is truncated, damaged, not a checkpoint, or one of another version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        state = None
    if isinstance(state, dict) and state.get("format") != _FORMAT and str(state.get("format")).startswith(_FAMILY):
        raise UserError(f"{path} was written by another version of nesterov_pp; resume the run with that version")
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        others = [p.name for p in checkpoints(path.parent, path.stem[len(_PREFIX) + _DIGITS :]) if p < path]
        then = f"continue from {others[-1]}" if others else "start from the beginning"
        raise UserError(f"{path} is truncated or damaged; remove it, and --resume will {then}")
    return state
