"""The device pass for the host, compiled once."""

from __future__ import annotations

import ctypes

import pytest
from on_host import library


@pytest.fixture(scope="session")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return library(str(tmp_path_factory.mktemp("host")))


@pytest.fixture
def tensors_of_the_backend() -> None:
    """The tests of this folder name their devices themselves."""
