"""Strange tensors by name: parameters, gradients, and changes to state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

DEADLY = {"freed", "cut short", "wrapping what was freed"}
"""Tensors that make torch's own operators read memory that does not exist."""


class Wrapped(Tensor):
    """A wrapper tensor without elements of its own: its operators use those of another tensor."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def inner(t: Any) -> Any:
            return t.inner if isinstance(t, Wrapped) else t

        return func(*tree_map(inner, args), **tree_map(inner, kwargs or {}))


class Mine(nn.Parameter):
    """A parameter of a user's own type, without operators of its own."""


def values(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draw random numbers away from 0, so that their squares are representable in float16 too."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    drawn = torch.randn(shape, generator=generator, dtype=wide)
    parts = torch.view_as_real(drawn) if dtype.is_complex else drawn
    parts += 0.25 * parts.sign()
    return drawn.to(dtype)


def negated(t: Tensor) -> Tensor:
    """Return the values of ``t`` under the negative bit."""
    return torch._neg_view(t.detach().clone().neg_())


def conjugated(t: Tensor) -> Tensor:
    """Return the values of ``t`` under the conjugate bit if it is complex."""
    return t.detach().clone().conj().resolve_conj().conj() if t.is_complex() else t


def freed(t: Tensor) -> Tensor:
    """Free the memory of the elements."""
    t.untyped_storage().resize_(0)
    return t


def cut_short(t: Tensor) -> Tensor:
    """Remove the last byte of the storage."""
    t.untyped_storage().resize_(max(0, t.untyped_storage().nbytes() - 1))
    return t


def with_gaps(t: Tensor) -> Tensor:
    """Return the values of ``t`` as every other element of a larger tensor."""
    larger = torch.zeros((*t.shape, 2), dtype=t.dtype)
    larger[..., 0] = t
    return larger[..., 0]


def transposed(t: Tensor) -> Tensor:
    """Return ``t`` with its strides in the opposite order."""
    order = tuple(range(t.dim()))[::-1]
    return t.permute(order).contiguous().permute(order) if t.dim() > 1 else t


def within(t: Tensor) -> Tensor:
    """Return the values of ``t`` in the middle of a larger tensor, at an unaligned address."""
    larger = torch.zeros(t.numel() + 3, dtype=t.dtype)
    larger[1 : 1 + t.numel()] = t.flatten()
    return larger[1 : 1 + t.numel()].view(t.shape)


def expanded(t: Tensor) -> Tensor:
    """Return the first element of ``t``, expanded to its shape."""
    return t.flatten()[:1].reshape([1] * t.dim()).expand(t.shape) if t.numel() else t


def in_inference_mode(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def made_in_inference_mode(t: Tensor) -> nn.Parameter:
    with torch.inference_mode():
        return nn.Parameter(t.clone())


def fake(t: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.empty(t.shape, dtype=t.dtype)


def left_by_a_transform(t: Tensor) -> Tensor:
    kept: list[Tensor] = []
    torch.func.vmap(lambda x: (kept.append(x), x)[1])(torch.stack([t, t]))
    return kept[0]


def masked(t: Tensor) -> Tensor:
    from torch.masked import masked_tensor

    return masked_tensor(t, torch.ones(t.shape, dtype=torch.bool))


PARAMETERS: dict[str, Callable[[Tensor], nn.Parameter]] = {
    "plain": nn.Parameter,
    "of one's own type": Mine,
    "transposed": lambda t: nn.Parameter(transposed(t)),
    "with gaps": lambda t: nn.Parameter(with_gaps(t)),
    "within": lambda t: nn.Parameter(within(t)),
    "expanded": lambda t: nn.Parameter(expanded(t)),
    "negated": lambda t: nn.Parameter(negated(t)),
    "conjugated": lambda t: nn.Parameter(conjugated(t)),
    "copied on write": lambda t: nn.Parameter(torch._lazy_clone(t)),
    "frozen": lambda t: nn.Parameter(t, requires_grad=False),
    "freed": lambda t: freed(nn.Parameter(t)),  # type: ignore[dict-item]
    "cut short": lambda t: cut_short(nn.Parameter(t)),  # type: ignore[dict-item]
    "of inference mode": lambda t: made_in_inference_mode(t),
    "on meta": lambda t: nn.Parameter(t.to("meta")),
    "sparse": lambda t: nn.Parameter(t.to_sparse()),
    "of integers": lambda t: nn.Parameter(torch.ones(t.shape, dtype=torch.int32), requires_grad=False),
}

GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor | None]] = {
    "plain": lambda g, p: g,
    "none": lambda g, p: None,
    "zeros without memory": lambda g, p: torch._efficientzerotensor(g.shape, dtype=g.dtype, device=g.device),
    "negated": lambda g, p: negated(g),
    "conjugated": lambda g, p: conjugated(g),
    "transposed": lambda g, p: transposed(g),
    "with gaps": lambda g, p: with_gaps(g),
    "within": lambda g, p: within(g),
    "expanded": lambda g, p: expanded(g),
    "negated, with gaps": lambda g, p: torch._neg_view(with_gaps(-g)),
    "wrapped": lambda g, p: Wrapped(g),
    "masked": lambda g, p: masked(g),
    "fake": lambda g, p: fake(g),
    "left by a transform": lambda g, p: left_by_a_transform(g),
    "in inference mode": lambda g, p: in_inference_mode(g),
    "copied on write": lambda g, p: torch._lazy_clone(g),
    "requiring gradients": lambda g, p: g.requires_grad_() * 1,
    "freed": lambda g, p: freed(g),
    "cut short": lambda g, p: cut_short(g),
    "on meta": lambda g, p: g.to("meta"),
    "sparse": lambda g, p: g.to_sparse(),
    "of another dtype": lambda g, p: g.to(torch.float64),
    "of another shape": lambda g, p: torch.ones(5),
    "infinite": lambda g, p: g * float("inf"),
}


def _replace(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], None]:
    def act(entries: dict[str, Any]) -> None:
        if isinstance(entries.get(name), Tensor) and not entries[name].is_meta:
            entries[name] = make(entries[name].clone())

    return act


STATES: dict[str, Callable[[dict[str, Any]], None]] = {
    "plain": lambda entries: None,
    "cleared": lambda entries: entries.clear(),
    "first moment negated": _replace("exp_avg", negated),
    "second moment negated": _replace("exp_avg_sq", negated),
    "first moment conjugated": _replace("exp_avg", conjugated),
    "steps negated": _replace("step", negated),
    "freed": _replace("exp_avg", freed),
    "cut short": _replace("exp_avg_sq", cut_short),
    "zeros without memory": _replace(
        "exp_avg", lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype, device=t.device)
    ),
    "with gaps": _replace("exp_avg_sq", with_gaps),
    "transposed": _replace("exp_avg", transposed),
    "wrapped": _replace("exp_avg", Wrapped),
    "fake": _replace("exp_avg", fake),
    "of inference mode": _replace("exp_avg_sq", in_inference_mode),
    "on meta": _replace("exp_avg", lambda t: t.to("meta")),
    "of another shape": _replace("exp_avg", lambda t: torch.ones(7)),
    "of integers": _replace("exp_avg", lambda t: t.real.to(torch.int32)),
    "many steps": _replace("step", lambda t: torch.ones(3)),
    "no first moment": lambda entries: entries.pop("exp_avg", None),
    "something else": lambda entries: entries.__setitem__("exp_avg", 3),
}
