"""Hooks of a ring on its module, to see which forwards run and which version the backward of each belongs to.

[note: why a backward binds the version of its forward]
Autograd remembers the leaves of a forward, so an ordinary backward needs no binding. Activation checkpointing, however,
runs parts of the forward again during backward, and such a forward reads the weights from the module like any other:
the newest ones, which are not those of the microbatch. Nothing in the gradient shows it. So a forward leaves a hook on
the autograd node of each of its outputs. The hook runs before any node inside, and binds the version of the forward
until this backward ends. One backward through forwards of several versions binds them in turn, because autograd visits
nodes in the reverse order of their creation. Code without such a hook (for example the module's parts, called one by
one inside reentrant checkpoints) finds no version bound when it runs again, and that is an error instead.

Compiled code has no hooks of this kind and needs none: what it computes again takes the weights as inputs, saved with
the forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from nesterov_pp.stash.bindings import Bindings


class Watch:
    """The hooks of one ring on one module; a copy of the module has hooks that do nothing.

    Attributes:
        ran_compiled: whether the module ran in compiled code, with gradients, since this was last set to False.
    """

    def __init__(self, bindings: Bindings | None = None) -> None:
        self._bindings = None if bindings is None else weakref.ref(bindings)
        self._outermost: nn.Module | None = None
        self.ran_compiled = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Watch, ()

    def attach(self, module: nn.Module) -> list[Any]:
        """Hook the module and all its parts that contain parameters at any depth; return the handles.

        Layers without parts, of which there are many, only get the check.
        """
        handles = []
        for part in module.modules():
            if part is module or (part._modules and next(part.parameters(), None) is not None):
                handles.append(part.register_forward_pre_hook(self.before))
                handles.append(part.register_forward_hook(self.after, always_call=True))
            elif part._parameters:
                handles.append(part.register_forward_pre_hook(self.check))
        return handles

    def before(self, module: nn.Module, _: Any) -> None:
        """Run ``check``, and note the outermost module of a forward."""
        self.check(module, _)
        if torch.compiler.is_compiling():  # first: the compiler must not see the module that it is compiling again
            return
        if self._outermost is None and torch._C._current_graph_task_id() == -1:
            self._outermost = module

    def check(self, _: nn.Module, __: Any) -> None:
        """Note compiled code; raise RuntimeError for a forward that runs again and would not compute what it did."""
        if torch.compiler.is_compiling():
            # Set once: torch 2.11 compiles no checkpointed block that changes something outside of it.
            if torch.is_grad_enabled() and not self.ran_compiled:
                self.ran_compiled = True
        elif torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled():
            bindings = None if self._bindings is None else self._bindings()
            if bindings is not None:
                bindings.check_recomputed()

    def after(self, module: nn.Module, _: Any, output: Any) -> None:
        """Count the forward, and hook its outputs so that its backward binds its version."""
        if torch.compiler.is_compiling() or self._outermost is not module:
            return
        self._outermost = None
        bindings = None if self._bindings is None else self._bindings()
        ran = bindings.ran_forward() if bindings is not None and torch.is_grad_enabled() else None
        if ran is None:
            return
        begin = partial(self._begin_backward, *ran)
        for tensor in (output,) if isinstance(output, Tensor) else tree_leaves(output):
            node: Any = tensor.grad_fn if isinstance(tensor, Tensor) else None
            # A tensor that the module only passes on may belong to an earlier forward of it.
            if node is not None and self not in node.metadata:
                node.metadata[self] = True
                node.register_prehook(begin)

    def forget(self) -> None:
        """Forget the running forward, which did not get to its end."""
        self._outermost = None

    def _begin_backward(self, version: int, linearise_at: str, loads: int, _: Any) -> None:
        bindings = None if self._bindings is None else self._bindings()
        if bindings is not None and not torch.compiler.is_compiling():
            bindings.begin_backward(version, linearise_at, loads)


class Ending:
    """An action that runs when this is called, or else when it is dropped."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act, self.done = act, False

    def __call__(self) -> None:
        if not self.done:
            self._act()
            self.done = True

    __del__ = __call__


def detach(handles: Iterable[Any]) -> None:
    """Remove the hooks."""
    for handle in handles:
        handle.remove()
