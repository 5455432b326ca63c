"""The device pass, compiled once for the host."""

from __future__ import annotations

import ctypes
import fcntl
import os

import pytest
from on_host import library


@pytest.fixture(scope="session")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the library in the first process of a test run that needs it; the others wait."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "host"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return library(folder)


@pytest.fixture
def tensors_of_the_backend() -> None:
    """Override the fixture that moves tensors: the tests in this folder name their devices themselves."""
