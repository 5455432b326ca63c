"""What ``state_dict`` and ``load_state_dict`` of a module mean while a ring holds predictions of its weights.

[note: why the module is not simply bound to the stepped weights]
Forwards outside of any block have to run with the predictions, so the module's parameters are the predictions. But
whoever saves a module means the weights that training has reached. So ``state_dict``, asked of the module, of a part of
it or of a module around it, returns the stepped weights, and weights that are loaded become the stepped weights and the
newest version alike, as when the ring was built. When the ring is gone, the module keeps the stepped weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

Pair = tuple[Sequence[nn.Parameter], Sequence[nn.Parameter]]
"""The leaves of the newest version and the shadows, in the order of the ring."""


class PartState:
    """The hooks of a ring on one part of its module; a copy of the module has hooks that do nothing.

    Args:
        pair: returns the newest leaves and the shadows, or None while the module is bound to other weights; its
            argument says whether to take over changes made to the module first.
        own: the number in the ring of each parameter that the part itself has, by its name there.
    """

    def __init__(
        self,
        pair: weakref.WeakMethod[Callable[[bool], Pair | None]] | None = None,
        own: Mapping[str, int] | None = None,
    ) -> None:
        self._pair_of, self._own = pair, own or {}
        self._before: dict[str, tuple[int, int]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return PartState, ()

    def attach(self, part: nn.Module, *, stepped: bool) -> list[Any]:
        """Hook the part; return the handles. ``stepped`` says whether the shadows are the stepped weights."""
        torch_part: Any = part  # torch's methods for hooks are not typed
        handles = [
            torch_part.register_load_state_dict_pre_hook(self._before_load),
            torch_part.register_load_state_dict_post_hook(self._after_load),
        ]
        if stepped:  # partial: torch marks the hook, which a method does not allow
            handles.append(torch_part.register_state_dict_post_hook(partial(self._show_stepped)))
        return handles

    def _pair(self, *, follow: bool) -> Pair | None:
        pair = None if self._pair_of is None else self._pair_of()
        return None if pair is None else pair(follow)

    def _show_stepped(self, _: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        pair = self._pair(follow=True)
        if pair is None:
            return
        for name, i in self._own.items():
            entry = state.get(prefix + name)
            if entry is not None:
                newest, shadow = pair[0][i], pair[1][i]
                state[prefix + name] = shadow if entry is newest else shadow.detach()

    def _before_load(self, *_: Any) -> None:
        pair = self._pair(follow=False)
        self._before = {} if pair is None else {name: _mark(pair[0][i]) for name, i in self._own.items()}

    @torch.no_grad()
    def _after_load(self, *_: Any) -> None:
        before, self._before = self._before, {}
        pair = self._pair(follow=False)
        if pair is None:
            return
        for name, mark in before.items():
            newest, shadow = pair[0][self._own[name]], pair[1][self._own[name]]
            if _mark(newest) != mark:
                shadow.copy_(newest)


def _mark(p: nn.Parameter) -> tuple[int, int]:
    """Return numbers that change when a parameter is written or swapped."""
    return p._version, id(p) if hasattr(p, "to_local") else p.data_ptr()
