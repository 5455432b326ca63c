"""The metrics of a run: a file with one JSON object per line, and the same values for TensorBoard.

A line is ``{"microbatch": m, "loss": ..., "lr": ...}`` for the m-th microbatch (from 1),
``{"microbatch": m, "validation_loss": ...}`` for the weights after it, or with ``--diagnostics``
``{"microbatch": m, "stage": i, "cosine": ...}`` for a measurement of stage i (from 1) that ended with its update.
Losses are means in nats per token.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from nesterov_pp.training.checkpoint import writing
from nesterov_pp.training.config import UserError

_FLUSH_EVERY = 10
_NUMBERS = count()


class MetricsLog:
    """A metrics file to append to; when it is opened, only its first ``keep`` bytes are kept.

    Raises:
        UserError: the file has fewer than ``keep`` bytes.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = path
        size = path.stat().st_size if path.exists() else 0
        if size < keep:
            raise UserError(f"{path} has lost lines that the checkpoint relies on; the run cannot be resumed")
        with writing(path):
            self._file = path.open("ab")
            self._file.truncate(keep)
        self._lines = 0

    def write(self, **values: float) -> None:
        """Append a line; raise RunError if the file cannot be written (the disk is full, ...)."""
        with writing(self.path):
            self._file.write(json.dumps(values, allow_nan=False).encode() + b"\n")
            self._lines += 1
            if self._lines % _FLUSH_EVERY == 0:
                self._file.flush()

    def sync(self) -> int:
        """Write every line to disk; return the number of bytes up to here."""
        with writing(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Write the remaining lines; raise RunError if the file cannot be written."""
        with writing(self.path):
            self._file.close()


class ScalarLog:
    """A new TensorBoard event file, which hides scalars written earlier for microbatches after ``microbatch``.

    TensorBoard's own writer writes in a thread, which reports a full disk by a stack trace.
    """

    def __init__(self, folder: Path, microbatch: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        # The number tells apart the files of processes that begin within a second.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self.path = folder / name
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("wb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=microbatch + 1, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def add(self, tag: str, value: float, microbatch: int) -> None:
        """Add a scalar; raise RunError if the file cannot be written."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._write(step=microbatch, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))

    def flush(self) -> None:
        with writing(self.path):
            self._records.flush()

    def close(self) -> None:
        with writing(self.path):
            self._records.close()

    def _write(self, **parts: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        with writing(self.path):
            self._records.write(Event(wall_time=time.time(), **parts).SerializeToString())


@dataclass(frozen=True)
class Curves:
    """Curves of a run over microbatches: ``train[i]`` is the loss of microbatch ``i + 1``; ``cosines`` are by stage."""

    train: list[float]
    validation: list[tuple[int, float]]
    cosines: dict[int, list[tuple[int, float]]] = field(default_factory=dict)


def read_curves(path: Path) -> Curves:
    """Return the curves in the complete lines of a metrics file; an unfinished last line is left out.

    Raises:
        UserError: the file cannot be read or is not a metrics file.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
        rows = [json.loads(line) for line in lines]
        train = [float(row["loss"]) for row in rows if "loss" in row]
        others = [row for row in rows if "loss" not in row and "cosine" not in row]
        validation = [(int(row["microbatch"]), float(row["validation_loss"])) for row in others]
        cosines: dict[int, list[tuple[int, float]]] = {}
        for row in rows:
            if "cosine" in row:
                cosines.setdefault(int(row["stage"]), []).append((int(row["microbatch"]), float(row["cosine"])))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged") from None
    return Curves(train, validation, dict(sorted(cosines.items())))


def microbatches_done(path: Path) -> int:
    """Return the microbatch of the last complete line of a metrics file; 0 if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["microbatch"]) if lines else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0
