"""What a plan was made of."""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_
from typing import Any

from torch import Tensor

from nesterov_pp.kernels import extension
from nesterov_pp.optim.local import is_plain, is_resolved, local


class Snapshot:
    """Notices when a framework, a checkpoint or a user has replaced a parameter or an entry of its state since.

    ``leaves`` are all parameters that are stepped, those of every ring slot too.
    """

    def __init__(self, groups: list[dict[str, Any]], state: dict[Any, Any], leaves: list[Tensor]) -> None:
        self._objects = list(_objects(groups, state))
        self._special = [(p, local(p)) for p in leaves if not is_plain(p) and not is_resolved(p)]

    def holds(self, groups: list[dict[str, Any]], state: dict[Any, Any]) -> bool:
        """Whether all are the same objects still, and local shards where they were."""
        module, _ = extension.load()
        if module is not None:
            same = module.holds(groups, state, self._objects)
        else:
            now = list(_objects(groups, state))
            same = len(now) == len(self._objects) and all(map(is_, now, self._objects))
        return bool(same) and all(_same_place(local(p), then) for p, then in self._special)


def _objects(groups: list[dict[str, Any]], state: dict[Any, Any]) -> Iterator[Any]:
    for group in groups:
        yield from group["params"]
    for key, entry in state.items():
        if not isinstance(key, Tensor):
            continue  # a user's own
        yield entry
        if isinstance(entry, dict):
            yield from entry.values()


def _same_place(now: Tensor, then: Tensor) -> bool:
    return now.data_ptr() == then.data_ptr() and now.shape == then.shape and now.stride() == then.stride()
