"""Files of checkpoints: each is either complete or absent, and the older ones go when all processes have newer ones."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch

KEPT = 2
"""Default number of checkpoints to keep."""

_FAMILY = "nesterov_pp run "
_FORMAT = f"{_FAMILY}1"
_PREFIX = "checkpoint-"
_DIGITS = 9
_NAME = re.compile(rf"{_PREFIX}\d{{{_DIGITS}}}(?:\.stage-(\d+)-of-(\d+))?\.pt")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; what the block writes there takes the name ``path`` at its end.

    At any moment, ``path`` is the old file or the complete new one, even after a power cut.

    Raises:
        OSError: the file cannot be written (the disk is full, ...), in one sentence; ``path`` is left as it was.
    """
    temporary = path.with_name(f".{path.name}.part")
    with naming(path):
        try:
            yield temporary
            with temporary.open("rb+") as file:
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


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file through ``replacing``.

    Raises:
        OSError: as for ``replacing``.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        write(file)


def serialise(state: dict[str, Any], file: IO[bytes]) -> None:
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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into one whose message is a sentence about ``path``."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None


def checkpoints(folder: Path, part: str = "") -> list[Path]:
    """Return the checkpoints in a folder, oldest first: those of one stage's ``part``, or of a whole pipeline ("")."""
    return sorted(folder.glob(f"{_PREFIX}{'[0-9]' * _DIGITS}{part}.pt"))


def stage_part(stage: int, stages: int) -> str:
    """Return the part of a checkpoint's file name that marks one stage (from 0)."""
    return f".stage-{stage + 1}-of-{stages}"


def microbatch_of(path: Path) -> int:
    """Return the number of microbatches done before a checkpoint."""
    return int(path.name[len(_PREFIX) :][:_DIGITS])


def parts_in(folder: Path) -> dict[int, dict[int, list[Path]]]:
    """Return all files of checkpoints by the number of processes that wrote each (1 for a whole pipeline).

    They are ``{processes: {microbatch: [files in the order of the stages]}}``, complete or not.
    """
    found: dict[int, dict[int, list[Path]]] = {}
    named = ((path, _NAME.fullmatch(path.name)) for path in folder.glob(f"{_PREFIX}*.pt"))
    for path, name in sorted(named, key=lambda pair: int(pair[1][1] or 0) if pair[1] else 0):
        if name is not None:
            found.setdefault(int(name[2] or 1), {}).setdefault(microbatch_of(path), []).append(path)
    return found


def newest_complete(folder: Path) -> list[Path]:
    """Return the files of the newest checkpoint that is complete, in the order of the stages; none if there is none."""
    whole = {
        (microbatch, -processes): files
        for processes, by_microbatch in parts_in(folder).items()
        for microbatch, files in by_microbatch.items()
        if len(files) == processes
    }
    return whole[max(whole)] if whole else []


def newest(folder: Path, part: str, gather: Callable[[set[int]], list[set[int]]]) -> Path | None:
    """Return this process's file of the newest checkpoint that every process has; None if there is none.

    ``gather`` returns the value of every process.
    """
    mine = {microbatch_of(path): path for path in checkpoints(folder, part)}
    common = set.intersection(*gather(set(mine)))
    return mine[max(common)] if common else None


def write(
    folder: Path,
    microbatch: int,
    state: dict[str, Any],
    *,
    part: str = "",
    certain: int | None = None,
    keep: int = KEPT,
) -> Path:
    """Write the checkpoint after ``microbatch`` microbatches, delete old ones, and return its path.

    The newest ``keep`` complete checkpoints are kept. Where each stage writes its own part, the complete checkpoints
    are those of at most ``certain`` microbatches, which all stages have written. Checkpoints of later microbatches,
    which a run that went back to an earlier one left behind, are deleted.

    Raises:
        OSError: the checkpoint cannot be written, in one sentence; the older ones are kept.
    """
    path = folder / f"{_PREFIX}{microbatch:0{_DIGITS}d}{part}.pt"
    write_atomic(path, lambda file: serialise({"format": _FORMAT, "microbatch": microbatch, **state}, file))
    certain = microbatch if certain is None else certain
    own = checkpoints(folder, part)
    with naming(folder):
        for old in [p for p in own if microbatch_of(p) <= certain][:-keep] + [p for p in own if p > path]:
            old.unlink(missing_ok=True)
    return path


def read(path: Path, *, resume: str = "resume") -> dict[str, Any]:
    """Return what ``write`` wrote, including ``microbatch``. No code in the file is executed.

    Raises:
        ValueError: the file is truncated, damaged, not a checkpoint, or one of another version. ``resume`` names what
            continues without it.
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
        raise ValueError(f"{path} was written by another version of nesterov_pp; resume the run with that version")
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        others = [p.name for p in checkpoints(path.parent, path.stem[len(_PREFIX) + _DIGITS :]) if p < path]
        then = f"continue from {others[-1]}" if others else "start from the beginning"
        raise ValueError(f"{path} is truncated or damaged; remove it, and {resume} will {then}")
    return state


def clear_leftovers(folder: Path, part: str = "") -> None:
    """Delete what an interrupted ``write`` of this part has left."""
    for leftover in folder.glob(f".{_PREFIX}{'[0-9]' * _DIGITS}{part}.pt.part"):
        leftover.unlink(missing_ok=True)
