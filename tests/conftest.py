"""Tests of a device backend create their tensors on that device; no test depends on the width of a terminal."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from backends import DEVICE, ON_DEVICE, DrawnOnTheHost


@pytest.fixture(autouse=True)
def no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the width of the terminal that the tests were started from, which test runners pass on."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread, like the processes that a test compares with: sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def tensors_of_the_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    call = getattr(request.node, "callspec", None)
    if call is None or call.params.get("backend") not in ON_DEVICE:
        yield
        return
    with DEVICE, DrawnOnTheHost(DEVICE):
        yield
