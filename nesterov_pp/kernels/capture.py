"""Detection of work that is captured in a CUDA graph."""

from __future__ import annotations

import torch


def captures() -> bool:
    """Return whether work launched now on the current stream is captured instead of run; start no CUDA context."""
    return bool(torch.cuda.is_initialized()) and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
