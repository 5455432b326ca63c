"""State in eight bits: the entries of a parameter's state that hold codes, and their conversion from and to float32.

The codes of a moment are the entry of that name; ``exp_avg_scale`` and ``exp_avg_sq_scale`` hold the scales.
``master_residual`` completes bfloat16 weights to 24 bits. ``kernels/codes.py`` describes the codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nesterov_pp.kernels.codes import (
    Coded,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
    group_count,
    joined,
    root,
    split,
)

SCALE_OF = {"exp_avg": "exp_avg_scale", "exp_avg_sq": "exp_avg_sq_scale"}
CODES = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
RESIDUAL = "master_residual"


def is_coded(entries: Mapping[str, Any]) -> bool:
    """Return whether the moments of a parameter's state are in eight bits."""
    first = entries.get("exp_avg")
    return isinstance(first, Tensor) and first.dtype == torch.int8


def fresh_scales(p: Tensor) -> Tensor:
    """Return the scales of a moment that is 0."""
    return torch.zeros(group_count(p.numel()), dtype=torch.float16, device=p.device)


def check_saved(what: str, name: str, entries: Mapping[str, Any], p: Tensor) -> None:
    """Refuse saved codes without the scales that go with them.

    Raises:
        ValueError: the scales are missing, or of another dtype or number.
    """
    scales, count = entries.get(SCALE_OF[name]), group_count(p.numel())
    if not isinstance(scales, Tensor) or scales.dtype != torch.float16 or scales.shape != (count,):
        raise ValueError(f"{what} is in eight bits and needs {count} float16 scales, one for 32 elements")


@torch.no_grad()
def encode_entries(entries: dict[str, Any], p: Tensor) -> None:
    """Put the moments of a loaded state in eight bits, in groups along the parameter's memory."""
    for name, scale_name in SCALE_OF.items():
        value = entries.get(name)
        if not isinstance(value, Tensor):
            continue
        laid_out = torch.empty_like(p, dtype=CODES[name], memory_format=torch.preserve_format, requires_grad=False)
        if value.dtype == CODES[name] and value.stride() == laid_out.stride():
            continue
        wide = _widened(entries, name) if value.dtype == CODES[name] else value
        values = torch.empty_like(laid_out, dtype=torch.float32).copy_(wide)
        codes, entries[scale_name] = encode_first(values) if name == "exp_avg" else encode_second(root(values))
        entries[name] = laid_out.copy_(codes)


@torch.no_grad()
def widened_entries(entries: Mapping[str, Any], p: Tensor) -> dict[str, Any]:
    """Return a parameter's state with float32 moments and a float32 master weight in place of codes."""
    wide = dict(entries)
    if is_coded(entries):
        for name in CODES.keys() & entries.keys():
            wide[name] = _widened(entries, name)
            del wide[SCALE_OF[name]]
    if RESIDUAL in wide:
        wide["master_weight"] = joined(p.detach(), wide.pop(RESIDUAL))
    return wide


def residual_of(master: Tensor) -> Tensor:
    """Return the residual of a float32 master weight."""
    return split(master)[1]


def _widened(entries: Mapping[str, Any], name: str) -> Tensor:
    coded = Coded(entries[name], entries[SCALE_OF[name]])
    return decode_first(coded) if name == "exp_avg" else decode_second(coded)
