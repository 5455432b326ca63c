"""The folder of a run: its files, and the lock of the process that writes them."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from nesterov_pp.training.config import UserError


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files. Files whose names begin with a dot are leftovers of interrupted writes."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def alignment_plot(self) -> Path:
        return self.path / "alignment.png"

    @property
    def sample(self) -> Path:
        return self.path / "sample.txt"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def recorded(self, *, resume: bool) -> dict[str, Any] | None:
        """Return the contents of the configuration file of the run to resume; None where a new run may begin.

        With ``resume``, too, an absent or empty folder begins a new run. Nothing is changed.

        Raises:
            UserError: the folder holds a run and ``resume`` is False, or it holds something else.
        """
        if is_fresh(self.path):
            return None
        if not self.config.exists():
            raise UserError(f"{self.path} holds other files but no run; give an empty or new folder with --out")
        if not resume:
            raise UserError(f"{self.path} already holds a run; add --resume to continue it, or give another --out")
        return read_object(self.config)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Create the folder, and keep other processes from training in it during the block.

        Raises:
            UserError: the folder cannot be created or written to, or another process is training in it.
        """
        make_folder(self.path)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            # The lock is released when the process ends, however it ends.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(f"another process is training in {self.path}; wait for it, or give another --out") from None
        except OSError:
            pass  # a file system without locks
        try:
            for leftover in self.path.glob(".*.part"):
                leftover.unlink()
            yield
        finally:
            os.close(handle)


def is_fresh(path: Path) -> bool:
    """Return whether a folder is absent or empty, apart from hidden files.

    Raises:
        UserError: the path is not a folder, or the folder cannot be read.
    """
    try:
        return all(name.startswith(".") for name in os.listdir(path))
    except FileNotFoundError:
        return True
    except OSError as error:
        raise UserError(f"--out {path} cannot be used: {error.strerror}") from None


def make_folder(path: Path) -> None:
    """Create a folder to write in.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path} cannot be created: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"--out {path} cannot be written to; give a folder that you may write to")


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in one of a run's files.

    Raises:
        UserError: the file cannot be read, or does not hold one JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged; give another --out")
    return cast(dict[str, Any], value)
