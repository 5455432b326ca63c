"""The metrics of a run: a file with one JSON object per line, and the same values for TensorBoard.

A line is ``{"microbatch": m, "loss": ..., "lr": ...}`` for the m-th microbatch (from 1),
``{"microbatch": m, "validation_loss": ...}`` for the weights after it, or with ``--diagnostics``
``{"microbatch": m, "stage": i, "cosine": ...}`` for a measurement of stage i (from 1) that ended with its update.
Losses are means in nats per token.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nesterov_pp.training.config import RunError, UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FLUSH_EVERY = 10


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
        self._file = path.open("ab")
        self._file.truncate(keep)
        self._lines = 0

    def write(self, **values: float) -> None:
        """Append a line; raise RunError if the file cannot be written (the disk is full, ...)."""
        try:
            self._file.write(json.dumps(values, allow_nan=False).encode() + b"\n")
            self._lines += 1
            if self._lines % _FLUSH_EVERY == 0:
                self._file.flush()
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error.strerror}") from None

    def sync(self) -> int:
        """Write every line to disk; return the number of bytes up to here."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error.strerror}") from None
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


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


def tensorboard_writer(folder: Path, microbatch: int) -> SummaryWriter:
    """Return a writer that hides scalars written earlier for microbatches after ``microbatch``."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=microbatch + 1)
