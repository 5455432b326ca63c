"""Any torch optimizer on a ring of weights, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from nesterov_pp.optim.options import LOW_PRECISION
from nesterov_pp.optim.uninterrupted import uninterrupted
from nesterov_pp.optim.wrapped.rotation import BasisRotation
from nesterov_pp.stash import Shadow, WeightStash

Build = Callable[[dict[str, nn.Parameter]], list[Optimizer]]
_NO_HIDDEN_MATRIX = {"tokens", "positions", "embedding", "embeddings", "embed_tokens", "wte", "wpe"} | {
    "out",
    "output",
    "head",
    "lm_head",
}
"""Parts of names that mark embeddings and heads, which Muon leaves to AdamW."""


class StepsCopies:
    """An optimizer that uses torch optimizers to step the shadow of a ``WeightStash(shadow="stepped")``.

    It writes the next version as ``x = w' + s (w' - w)``, where s is the groups' ``"horizon"``, or 0 if they have none.
    A step takes several passes over memory, so this is for rules that are not one element-wise pass anyway: those with
    matrix products. Ctrl-C waits until the step is done.

    Args:
        params: the parameters; only their number is used, since the weights of the stash are stepped.
        lr: learning rate of all groups.
        stash: the ring of weight versions.
        base: "muon": ``torch.optim.Muon`` (with its learning rate adjusted to match AdamW's) for hidden matrices, and
            AdamW for embeddings, heads (recognised by the names of their parameters) and everything that is not a
            matrix. "basis-rotation": ``BasisRotation``.
        max_grad_norm: clip the gradients to this global norm (default: None, no clipping).
        backend: "auto" or "reference"; there is no other backend.
        momentum: momentum of Muon (default: 0.95).
        options: further hyper-parameters: ``betas``, ``eps`` and ``weight_decay`` for both bases, and the others of
            ``BasisRotation``.

    Raises:
        ValueError: a hyper-parameter is out of range, the base is unknown, another backend is requested, or the number
            of parameters is not that of the stash.
    """

    shadow: ClassVar[Shadow] = "stepped"
    takes_groups: ClassVar[bool] = False

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        stash: WeightStash,
        base: str,
        max_grad_norm: float | None = None,
        backend: str = "auto",
        momentum: float = 0.95,
        **options: Any,
    ) -> None:
        if base not in _BASES:
            raise ValueError(f"base must be one of {', '.join(_BASES)}, not {base!r}")
        if backend not in ("auto", "reference"):
            raise ValueError(f"backend {backend!r} cannot be used: it does not have {base}; use 'reference' or 'auto'")
        if len(list(params)) != len(stash.names):
            raise ValueError("the optimizer of a WeightStash must step all its parameters")
        stash.attach(self)
        self.max_grad_norm = max_grad_norm
        self._stash = stash
        named = stash.weights()
        low = sorted({str(p.dtype).removeprefix("torch.") for p in named.values() if p.dtype in LOW_PRECISION})
        if base == "basis-rotation" and low:
            raise ValueError(f"basis-rotation steps float32 and float64 weights only, and some here are {low[0]}")
        self._weights = list(named.values())
        self._inner = _BASES[base](named, lr, momentum, options)
        self._half_way = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return list(chain.from_iterable(inner.param_groups for inner in self._inner))

    @property
    def state(self) -> Mapping[Any, dict[str, Any]]:
        return {p: state for inner in self._inner for p, state in inner.state.items()}

    @torch.no_grad()
    def step(self, *, version: int | None = None, microbatches: int = 1) -> None:
        """Take the gradients of a version, which are the sum over ``microbatches``, and write the next version.

        Raises:
            ValueError: in the same cases as ``WeightStash.begin_step``.
            RuntimeError: an earlier step failed half way, and no state has been loaded since.
        """
        stash = self._stash
        if self._half_way:
            raise RuntimeError(
                "an earlier step failed half way, with some of the weights stepped and others not; "
                "load the states of the stash and of its optimizer before the next step"
            )
        source, _, target = stash.begin_step(version, microbatches)
        slots = stash.leaves(self._leaves())
        for w, leaf in zip(self._weights, slots[source], strict=True):
            w.grad = None if leaf.grad is None else leaf.grad / microbatches
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._weights, self.max_grad_norm)
        ahead = float(self.param_groups[0].get("horizon", 0.0))
        before = [w.clone() for w in self._weights] if ahead else []
        with uninterrupted():
            self._half_way = True
            for inner in self._inner:
                inner.step()
            for i, (w, out) in enumerate(zip(self._weights, slots[target], strict=True)):
                out.copy_(w + ahead * (w - before[i]) if ahead else w)
                w.grad = None
            stash.end_step(version, microbatches)
            self._half_way = False

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"inner": [the state of each torch optimizer]}``."""
        return {"inner": [inner.state_dict() for inner in self._inner]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that ``state_dict`` returned."""
        for inner, saved in zip(self._inner, state_dict["inner"], strict=True):
            inner.load_state_dict(saved)
        self._half_way = False

    def _leaves(self) -> list[nn.Parameter]:
        return list(self._stash.parameters(self._stash.newest).values())


def _muon(named: dict[str, nn.Parameter], lr: float, momentum: float, options: dict[str, Any]) -> list[Optimizer]:
    hidden = [p for n, p in named.items() if p.dim() == 2 and not _NO_HIDDEN_MATRIX & set(n.split("."))]
    taken = {id(p) for p in hidden}
    others = [p for p in named.values() if id(p) not in taken]
    decay = options.get("weight_decay", 1e-2)
    inner: list[Optimizer] = []
    if hidden:
        inner.append(
            torch.optim.Muon(hidden, lr=lr, momentum=momentum, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        )
    if others:
        inner.append(AdamW(others, lr=lr, **options))
    return inner


def _basis_rotation(
    named: dict[str, nn.Parameter], lr: float, _momentum: float, options: dict[str, Any]
) -> list[Optimizer]:
    return [BasisRotation(list(named.values()), lr=lr, **options)]


_BASES: dict[str, Callable[[dict[str, nn.Parameter], float, float, dict[str, Any]], list[Optimizer]]] = {
    "muon": _muon,
    "basis-rotation": _basis_rotation,
}
