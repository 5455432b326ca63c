"""The device on which the device backends are tested: a GPU, or the CPU with Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

import nesterov_pp as npp
from nesterov_pp.kernels import extension

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = ["triton", "cuda"] if GPU else ["triton"]
SIZES = [0, 1, 3, 64, 1000, 4096, 16384, 17_001]
SMALL = [0, 1, 3, 64, 1000, 130, 5, 1025]  # for tests that do not depend on chunks


def skip_without_any() -> None:
    """Skip a module's tests if neither a GPU nor Triton's interpreter can run them."""
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is no GPU; `make test` runs these under TRITON_INTERPRET=1 too", allow_module_level=True)
    module, reason = extension.load()
    if module is None:
        pytest.skip(str(reason), allow_module_level=True)


def needs(backend: str) -> None:
    """Skip a test whose backend cannot run here."""
    reason = npp.kernels.available_backends()[backend]
    if reason is not None:
        pytest.skip(reason)


def values(dtype: torch.dtype, sizes: list[int] = SIZES, seed: int = 0) -> list[torch.Tensor]:
    """Draw normally distributed numbers on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(dtype) for n in sizes]
