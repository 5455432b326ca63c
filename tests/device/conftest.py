"""The device pass for the host, compiled once."""

from __future__ import annotations

import ctypes
import fcntl
import os

import pytest
from on_host import library


@pytest.fixture(scope="session")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Of the processes of a run the first to come compiles, and the others wait."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "host"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return library(folder)


@pytest.fixture
def tensors_of_the_backend() -> None:
    """The tests of this folder name their devices themselves."""
