"""Asynchronous workers and a parameter server, emulated in one process: the original setting of DANA and GBA.

Every worker holds a copy of the weights that the server sent it, computes a gradient at this copy, and gets new weights
when the gradient has arrived. Here the late weights are those of a whole model, and a delay is the number of gradients
that arrived in between: N - 1 with N equal workers.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

METHODS = (
    "asgd",
    "nag-asgd",
    "staleness-aware",
    "dc-asgd",
    "gap-aware",
    "dana-zero",
    "dana-slim",
    "dana-dc",
    "gba",
)


class VirtualWorkers:
    """N asynchronous workers that train ``model``, one gradient per call.

    theta are the server's weights, s the weights that the worker was sent, g its gradient at s, gamma the momentum::

        asgd             theta -= lr g                                             sends theta; others: below
        nag-asgd         v = gamma v + g                theta -= lr (gamma v + g)
        staleness-aware  theta -= lr / max(1, tau) g                               arXiv 1511.05950 (recalled)
        dc-asgd          theta -= lr (g + lambda g g (theta - s))                  arXiv 1609.08326
        gap-aware        v = gamma v + g / G            theta -= lr v              arXiv 1909.10802, G as ``GapAware``
        dana-zero        v_i = gamma v_i + g            theta -= lr v_i            arXiv 1907.11612
                         sends theta - lr gamma (v_1 + ... + v_N)
        dana-slim        v_i = gamma v_i + g            theta -= lr (gamma v_i + g)
        dana-dc          dana-zero with g + lambda g g (theta - s) for g
        gba              for every M gradients: g = sum_j [k - token_j <= iota] g_j / M, then v = gamma v + g and
                         theta -= lr v                                             arXiv 2205.11048 (recalled)

    A token of ``gba`` is the update that a gradient is meant for. Tokens are handed out with the weights, each one M
    times; k is the update that uses the gradient.

    Args:
        model: the module to train; its parameters are the server's weights.
        loss_fn: ``(output, targets) -> 0-d tensor``.
        method: one of the names above.
        workers: N, or the speed of each worker; equal workers take turns.
        lr: learning rate; may be changed at any time.
        momentum: gamma (default: 0.9).
        strength: lambda (default: 0.04, or 2 for dana-dc, as in their papers).
        global_batch: M (default: the number of workers).
        max_staleness: iota (default: 4).
        synchronous: for gba: compute all M gradients of an update at the newest weights, as workers that wait would.
            May be changed between two updates without changing anything else (default: False).

    Raises:
        ValueError: the method is unknown, or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        method: str,
        workers: int | Sequence[float],
        lr: float,
        *,
        momentum: float = 0.9,
        strength: float | None = None,
        global_batch: int | None = None,
        max_staleness: int = 4,
        synchronous: bool = False,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
        speeds = [1.0] * workers if isinstance(workers, int) else list(workers)
        if not speeds or any(speed <= 0.0 for speed in speeds):
            raise ValueError(f"workers must be at least 1, or a list of speeds above 0, not {workers}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be at least 0 and below 1, not {momentum}")
        if global_batch is not None and global_batch < 1:
            raise ValueError(f"global_batch must be at least 1, not {global_batch}")
        if synchronous and method != "gba":
            raise ValueError(f"method {method!r} has no synchronous form; only gba has one")
        self.model, self.loss_fn, self.method, self.lr = model, loss_fn, method, lr
        self.momentum = momentum
        self.strength = (2.0 if method == "dana-dc" else 0.04) if strength is None else strength
        self.global_batch = len(speeds) if global_batch is None else global_batch
        self.max_staleness = max_staleness
        self.synchronous = synchronous
        self.arrived = 0
        self.updates = 0
        self._speeds = speeds
        self._theta = [p for p in model.parameters() if p.requires_grad]
        own = len(speeds) if method.startswith("dana") else 1
        self._v = [[torch.zeros_like(p) for p in self._theta] for _ in range(own)]
        self._mean_square = [torch.zeros_like(p) for p in self._theta]
        self._steps = 0
        self._dealt = 0
        self._buffer: list[tuple[int, list[Tensor]]] = []
        self._sent = [self._send() for _ in speeds]
        self._finishing = [(1.0 / speed, i) for i, speed in enumerate(speeds)]
        heapq.heapify(self._finishing)

    def step(self, inputs: Any, targets: Any) -> Tensor:
        """Compute the gradient of the next worker to finish on these data, and apply it on the server.

        Returns:
            The loss at the worker's weights, a detached 0-d tensor.
        """
        now, worker = heapq.heappop(self._finishing)
        heapq.heappush(self._finishing, (now + 1.0 / self._speeds[worker], worker))
        if self.synchronous:
            self._sent[worker] = (self.updates, self.arrived, [p.detach().clone() for p in self._theta])
        token, at, late = self._sent[worker]
        loss, grads = self._gradient(late, inputs, targets)
        with torch.no_grad():
            self._take(worker, token, self.arrived - at, late, grads)
            self.arrived += 1
            self._sent[worker] = self._send()
        return loss

    def evaluate(self, inputs: Any, targets: Any) -> Tensor:
        """Return the loss at the server's weights, without gradients; a 0-d tensor."""
        with torch.no_grad():
            return self.loss_fn(self.model(inputs), targets)

    def _send(self) -> tuple[int, int, list[Tensor]]:
        """Return what a worker gets: a token, the number of gradients that have arrived, and a copy of the weights."""
        token = self._dealt // self.global_batch
        self._dealt += 1
        weights = [p.detach().clone() for p in self._theta]
        if self.method in ("dana-zero", "dana-dc"):
            for i, w in enumerate(weights):
                w.sub_(sum(v[i] for v in self._v), alpha=self.lr * self.momentum)
        return token, self.arrived, weights

    def _gradient(self, weights: list[Tensor], inputs: Any, targets: Any) -> tuple[Tensor, list[Tensor]]:
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        copies = {n: w.requires_grad_() for n, w in zip(named, weights, strict=True)}
        loss = self.loss_fn(torch.func.functional_call(self.model, copies, (inputs,)), targets)
        grads = list(torch.autograd.grad(loss, list(copies.values())))
        return loss.detach(), grads

    def _take(self, worker: int, token: int, delay: int, late: list[Tensor], grads: list[Tensor]) -> None:
        if self.method == "gba":
            self._take_batched(token, grads)
            return
        self._steps += 1
        lr = self.lr / max(1, delay) if self.method == "staleness-aware" else self.lr
        velocity = self._v[worker if len(self._v) > 1 else 0]
        for i, (p, s, g, v) in enumerate(zip(self._theta, late, grads, velocity, strict=True)):
            if self.method in ("dc-asgd", "dana-dc"):
                g = g + self.strength * g * g * (p - s)
            if self.method == "gap-aware":
                g = g / self._gap(i, p, s)
            if self.method in ("asgd", "dc-asgd", "staleness-aware"):
                p.sub_(lr * g)
                continue
            v.mul_(self.momentum).add_(g)
            if self.method == "gap-aware":
                self._mean_square[i].mul_(0.999).add_(v * v, alpha=0.001)
            looks_ahead = self.method in ("nag-asgd", "dana-slim")
            p.sub_(lr * (self.momentum * v + g if looks_ahead else v))
        self.updates += 1

    def _gap(self, i: int, p: Tensor, s: Tensor) -> Tensor:
        """Return ``1 + |theta - s| / C``, where C is the learning rate times the velocity's root mean square so far."""
        bias = 1.0 - 0.999 ** (self._steps - 1)
        size = (self._mean_square[i] / bias).sqrt() if bias > 0.0 else torch.zeros_like(p)
        return 1.0 + (p - s).abs() / (self.lr * (size + 1e-8))

    def _take_batched(self, token: int, grads: list[Tensor]) -> None:
        self._buffer.append((token, grads))
        if len(self._buffer) < self.global_batch:
            return
        kept = [late for token, late in self._buffer if self.updates - token <= self.max_staleness]
        for i, (p, v) in enumerate(zip(self._theta, self._v[0], strict=True)):
            g = sum((late[i] for late in kept), torch.zeros_like(p)) / self.global_batch
            v.mul_(self.momentum).add_(g)
            p.sub_(self.lr * v)
        self._buffer.clear()
        self.updates += 1
