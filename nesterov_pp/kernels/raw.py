"""Checks that a tensor's elements lie in memory as its shape and strides say, as ``csrc/plan/raw.h`` does in C++."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not_raw(t: Tensor) -> str | None:
    """Return why a pass cannot use the memory of a strided tensor directly, as the end of a sentence, or None."""
    why = why_never_raw(t)
    return "has a storage smaller than its shape (resized, or freed)" if why is None and not has_memory(t) else why


def why_never_raw(t: Tensor) -> str | None:
    """Return the part of ``why_not_raw`` that does not change from step to step, or None.

    The memory of a tensor may change: FSDP frees it between steps.
    """
    if is_subclass(t):
        return f"is a {type(t).__name__}, which keeps its elements elsewhere"
    if torch._C._functorch.is_functorch_wrapped_tensor(t):
        return "belongs to a transform of torch.func"
    if t._is_zerotensor():
        return "is a tensor of zeros without memory; materialise it with clone()"
    if t.is_neg():
        return "is negated lazily; materialise it with resolve_neg()"
    if t.is_conj():
        return "is conjugated lazily; materialise it with resolve_conj()"
    return None


def is_subclass(t: Tensor) -> bool:
    """Return whether the type of the tensor decides what operators do (``__torch_dispatch__``).

    This is False for a ``Parameter`` and for other types that do not override it.
    """
    return type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__


def answers_for_itself(t: Tensor) -> bool:
    """Return whether the elements are in another tensor, which a subclass or a ``torch.func`` transform wraps."""
    return is_subclass(t) or torch._C._functorch.is_functorch_wrapped_tensor(t)


def has_memory(t: Tensor) -> bool:
    """Return whether the storage of a strided tensor holds all its elements; True for other kinds of tensors."""
    if t.layout != torch.strided or t.device.type == "meta" or answers_for_itself(t):
        return True
    if t.is_nested or t.is_quantized or t.numel() == 0:
        return True
    last = t.storage_offset() + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return bool((last + 1) * t.element_size() <= t.untyped_storage().nbytes())


def is_writable(t: Tensor) -> bool:
    """Return whether the current mode may write the tensor; inference tensors are writable in inference mode only."""
    return not t.is_inference() or torch.is_inference_mode_enabled()


def in_transform() -> bool:
    """Return whether a ``torch.func`` transform, which tracks what operators write, is active."""
    return torch._C._functorch.maybe_current_level() is not None


def in_fake_mode() -> bool:
    """Return whether ``FakeTensorMode``, under which operators only compute shapes, is active."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
