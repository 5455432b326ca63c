"""A stage of ``torch.distributed.pipelining`` that an endless schedule can drive.

This is the only module that uses private names of torch: ``PipelineScheduleSingle._initialize_stage`` (which runs one
microbatch to agree on the shapes and dtypes that stages exchange), ``PipelineStage._get_init_p2p_neighbors_ops``, and
the entries of ``args_recv_info`` and ``grad_recv_info``. Tested with torch 2.13, 2.11 and 2.9.

Microbatch ``m`` is torch's chunk ``m % chunks``. Every per-chunk table in ``PipelineStage`` is a dict whose entries are
removed again, so a few chunk numbers serve a run of any length. Each message is received into its own memory, because
autograd may keep a received gradient, or a view of it, as a parameter's gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from nesterov_pp.pipeline.distributed.links import Messages


class _Unending(PipelineScheduleSingle):
    """A schedule used only for what schedules do before their first step."""

    def _step_microbatches(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError

    def prepare(self, inputs: tuple[Any, ...], targets: Tensor | None) -> None:
        self._stage.has_backward = True
        arguments: dict[str, Any] = {"args": inputs, "kwargs": {}, "target": targets}
        known = inspect.signature(self._initialize_stage).parameters
        self._initialize_stage(  # type: ignore[no-untyped-call]
            **{name: value for name, value in arguments.items() if name in known}
        )


class _Stage(PipelineStage):
    """A ``PipelineStage`` without the first exchange between neighbours where gloo does not need it.

    torch 2.9 sends more in that exchange than it receives.
    """

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return super()._get_init_p2p_neighbors_ops() if "nccl" in dist.get_backend(self.group) else []


class _Whole(nn.Module):
    """A wrapper that hides sharding from ``PipelineStage``, which would leave gradient reduction to its schedule."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)


class TorchStage:
    """The forwards and backwards of one stage, and the tensors that enter and leave it.

    Args:
        module: the module of the stage.
        stage: the number of the stage, from 0.
        stages: the number of stages.
        device: where the stage computes.
        chunks: number of microbatches that can be on the stage at a time, including those received ahead.
        loss_fn: ``(output of the last stage, targets) -> 0-d tensor``.
        group: one process per stage, in order; None for the default group.
    """

    def __init__(
        self,
        module: nn.Module,
        stage: int,
        stages: int,
        device: torch.device,
        chunks: int,
        loss_fn: Callable[[Any, Any], Tensor],
        group: dist.ProcessGroup | None,
    ) -> None:
        self.chunks = max(chunks, stages)  # torch 2.9 and 2.10 require at least one per stage
        self._module = module
        self._stage = _Stage(
            _Whole(module) if isinstance(module, FSDPModule) else module, stage, stages, device, group=group
        )
        self._schedule = _Unending(self._stage, n_microbatches=self.chunks, loss_fn=loss_fn, scale_grads=False)
        self._metas: dict[str, list[Tensor | None]] = {}
        known = inspect.signature(self._stage.forward_one_chunk).parameters
        self._keeping_no_output = {"save_forward_output": False} if "save_forward_output" in known else {}

    def prepare(self, inputs: tuple[Any, ...], targets: Tensor | None) -> None:
        """Agree with the neighbours on the tensors to exchange. All stages must call this.

        Weights and buffers stay unchanged.

        Raises:
            ValueError: tensors that are not floating-point are to be exchanged, or the stage has reentrant checkpoints,
                and this version of torch does not support it.
        """
        buffers = [(b, b.clone()) for b in self._module.buffers()]
        try:
            self._schedule.prepare(inputs, targets)
        except RuntimeError as error:
            if "When use_reentrant=True" in str(error):
                raise ValueError(
                    f"pipeline stages of torch {torch.__version__} do not support reentrant activation checkpoints; "
                    "use torch.utils.checkpoint with use_reentrant=False, or recompute=True"
                ) from None
            if "only Tensors of floating point" not in str(error):
                raise
            raise ValueError(
                f"torch {torch.__version__} sends only floating-point tensors between stages; "
                "use torch 2.13, or send the others as floating-point tensors"
            ) from None
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        self._stage.clear_runtime_states()
        for kind, infos in (("inputs", self._stage.args_recv_info), ("gradients", self._stage.grad_recv_info)):
            self._metas[kind] = [
                None
                if not _is_received(info) or info.buffer is None
                else torch.empty_like(info.buffer, device="meta", requires_grad=info.buffer.requires_grad)
                for info in infos.get(0, ())
            ]
            for chunk in infos:
                self._drop(infos[chunk])

    def receive_inputs(self, microbatch: int) -> Messages:
        """Allocate memory for a microbatch's activations; returns it with the ranks that send them."""
        chunk = microbatch % self.chunks
        self._allocate("inputs", self._stage.args_recv_info[chunk])
        return _messages(self._stage.get_fwd_recv_ops(chunk))

    def receive_gradients(self, microbatch: int) -> Messages:
        """Allocate memory for the gradients of a microbatch's outputs; returns it with the ranks that send them."""
        chunk = microbatch % self.chunks
        self._allocate("gradients", self._stage.grad_recv_info.get(chunk, ()))
        return _messages(self._stage.get_bwd_recv_ops(chunk))

    def forward(self, microbatch: int, inputs: tuple[Any, ...]) -> Any:
        """Return the stage's output. ``inputs`` matter on the first stage only.

        Raises:
            Exception: any exception that the module raises.
        """
        try:
            return self._stage.forward_one_chunk(microbatch % self.chunks, inputs, {}, **self._keeping_no_output)
        except RuntimeError as error:
            raise error.__cause__ or error from None
        finally:
            self._stage.output_chunks.clear()  # torch 2.9 keeps every output

    def outputs(self, microbatch: int) -> Messages:
        """Return the messages to send after a forward."""
        return _messages(self._stage.get_fwd_send_ops(microbatch % self.chunks))

    def backward(self, microbatch: int, loss: Tensor | None) -> Messages:
        """Differentiate a microbatch; returns the gradients to send back.

        Raises:
            Exception: any exception that autograd raises.
        """
        chunk = microbatch % self.chunks
        try:
            self._stage.backward_one_chunk(chunk, loss=loss)
        except RuntimeError as error:
            raise error.__cause__ or error from None
        finally:
            self._drop(self._stage.grad_recv_info.get(chunk, ()))
            self._drop(self._stage.args_recv_info[chunk])
        return _messages(self._stage.get_bwd_send_ops(chunk))

    def _allocate(self, kind: str, infos: tuple[Any, ...]) -> None:
        # A chunk for which torch has no entries has nothing to receive.
        for info, meta in zip(infos, self._metas[kind] if infos else (), strict=True):
            if meta is not None:
                info.buffer = torch.empty_like(meta, device=self._stage.device, requires_grad=meta.requires_grad)

    @staticmethod
    def _drop(infos: tuple[Any, ...]) -> None:
        for info in infos:
            if _is_received(info):
                info.buffer = None


def _is_received(info: Any) -> bool:
    """Return whether a neighbour sends ``info``; an input of the whole model has its own class in torch 2.11."""
    return not getattr(info, "is_root_arg", not hasattr(info, "buffer"))


def _messages(operations: list[dist.P2POp]) -> Messages:
    return [(op.tensor, op.peer) for op in operations]
