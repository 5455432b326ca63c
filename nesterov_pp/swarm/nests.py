"""States as messages: nests of dicts, lists, tuples, tensors and plain values as JSON and a list of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nesterov_pp.swarm.lineage import MalformedError

_DEEPEST = 32
_DTYPES = {str(d): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8)}


def pack(value: Any) -> tuple[Any, list[Tensor]]:
    """Return what ``unpack`` turns back into ``value``: JSON and tensors."""
    tensors: list[Tensor] = []
    return _packed(value, tensors), tensors


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    match value:
        case Tensor():
            tensors.append(value)
            return ["tensor", len(tensors) - 1]
        case torch.dtype():
            return ["dtype", str(value)]
        case dict():
            return ["dict", [[_packed(key, tensors), _packed(part, tensors)] for key, part in value.items()]]
        case list() | tuple():
            return ["tuple" if isinstance(value, tuple) else "list", [_packed(part, tensors) for part in value]]
        case float():
            return ["float", value.hex()]
        case None | bool() | int() | str():
            return ["plain", value]
    raise TypeError(f"a state cannot hold {type(value).__name__}")


def unpack(found: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the value that was packed.

    Raises:
        MalformedError: it is not what ``pack`` returns.
    """
    return _unpacked(found, tensors, 0)


def _unpacked(found: Any, tensors: Sequence[Tensor], depth: int) -> Any:
    if depth > _DEEPEST:
        raise MalformedError("a state that is too deep")
    match found:
        case ["tensor", int(i)] if 0 <= i < len(tensors):
            return tensors[i]
        case ["dtype", str(name)] if name in _DTYPES:
            return _DTYPES[name]
        case ["dict", list(items)] if all(isinstance(item, list) and len(item) == 2 for item in items):
            keys = [_unpacked(key, tensors, depth + 1) for key, _ in items]
            if all(isinstance(key, str | int) for key in keys):
                return dict(zip(keys, (_unpacked(part, tensors, depth + 1) for _, part in items), strict=True))
        case ["list", list(parts)]:
            return [_unpacked(part, tensors, depth + 1) for part in parts]
        case ["tuple", list(parts)]:
            return tuple(_unpacked(part, tensors, depth + 1) for part in parts)
        case ["float", str(text)] if len(text) < 40:
            try:
                return float.fromhex(text)
            except (ValueError, OverflowError):
                pass
        case ["plain", None | bool() | int() | str() as value]:
            return value
    raise MalformedError("a malformed state")
