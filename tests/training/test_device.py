"""A run whose model is on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nesterov_pp.cli import main
from nesterov_pp.training.metrics import read_curves
from tests.tolerances import MANY_STEPS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("method", ["nesterov", "nesterov-no-stash", "gap-aware", "xpipe"])
def test_its_losses_are_those_of_the_cpu(tiny: list[str], tmp_path: Path, method: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        flags = ["--method", method, "--device", device, "--microbatches", "40", "--out", str(out)]
        assert main(["train", *tiny, *flags]) == 0
        found.append([loss for _, loss in read_curves(out / "metrics.jsonl").validation])
    # Sums of many products are taken in another order, over 40 updates.
    assert found[1] == pytest.approx(found[0], rel=100 * MANY_STEPS[torch.float32]["rtol"])
