"""Whether a tensor's elements lie in memory as its shape and strides say: ``csrc/plan/raw.h`` for Python."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not_raw(t: Tensor) -> str | None:
    """What keeps a pass from going over the memory of a strided tensor itself, as the end of a sentence; or None."""
    why = why_never_raw(t)
    return "has a storage smaller than its shape (resized, or freed)" if why is None and not has_memory(t) else why


def why_never_raw(t: Tensor) -> str | None:
    """The part of it that does not change from step to step as the memory may, which FSDP frees between them."""
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
    """Whether operators ask the type of the tensor what to do. A ``Parameter`` or a type without such a say is none."""
    return type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__


def answers_for_itself(t: Tensor) -> bool:
    """Whether the elements are elsewhere, in a tensor that a subclass or a transform of ``torch.func`` wraps."""
    return is_subclass(t) or torch._C._functorch.is_functorch_wrapped_tensor(t)


def has_memory(t: Tensor) -> bool:
    """Whether the storage of a tensor holds all its elements; others than strided ones answer for themselves."""
    if t.layout != torch.strided or t.device.type == "meta" or answers_for_itself(t):
        return True
    if t.is_nested or t.is_quantized or t.numel() == 0:
        return True
    last = t.storage_offset() + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return bool((last + 1) * t.element_size() <= t.untyped_storage().nbytes())


def is_writable(t: Tensor) -> bool:
    """Whether the current mode may write the tensor: those of inference mode can be written in it alone."""
    return not t.is_inference() or torch.is_inference_mode_enabled()


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is under way, which keeps account of what operators write."""
    return torch._C._functorch.maybe_current_level() is not None


def in_fake_mode() -> bool:
    """Whether operators only compute shapes now, under ``FakeTensorMode``."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
