"""What a rotated step goes over: stacks of matrices with their bases, and one pass over all parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nesterov_pp.kernels import Tensors, choose_backend, make_plan
from nesterov_pp.optim import bases
from nesterov_pp.optim.options import Options
from nesterov_pp.optim.prepared import Snapshot


@dataclass
class Stack:
    """Matrices of one group, shape and dtype: their numbers among the parameters, and what is kept side by side.

    ``step`` receives what the pass takes from zeros, and ``gradients`` are the rotated gradients that the pass reads.
    """

    group: int
    numbers: list[int]
    covariances: dict[int, Tensor]
    bases: dict[int, Tensor]
    step: Tensor
    gradients: Tensor

    def part(self, chosen: list[int]) -> Stack:
        """Return some of the matrices: the stack itself if they are all, else one of them."""
        if len(chosen) == len(self.numbers):
            return self
        (i,) = chosen
        one = slice(i, i + 1)
        return Stack(
            self.group,
            self.numbers[one],
            {side: t[one] for side, t in self.covariances.items()},
            {side: t[one] for side, t in self.bases.items()},
            self.step[one],
            self.gradients[one],
        )


class RotatedTensors:
    """The parameters that have state, as the pass and the products take them."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        state: dict[Any, dict[str, Any]],
        options: Options,
        *,
        has_mu_product: bool,
    ) -> None:
        home = {p: k for k, group in enumerate(groups) for p in group["params"] if state.get(p)}  # each once
        self.parameters, group_of = list(home), list(home.values())
        stash = options.stash
        self.leaves = [self.parameters] if stash is None else stash.leaves(self.parameters)
        self.stacks = _stacks(self.parameters, group_of, groups, state)
        passed = [[p.detach() for p in slot] for slot in self.leaves]
        self._gradients: dict[int, Tensor] = {}
        rotated = set()
        for stack in self.stacks:
            for i, n in enumerate(stack.numbers):
                rotated.add(n)
                self._gradients[n] = stack.gradients[i]
                step = stack.step[i].detach()
                for slot in passed:
                    slot[n] = step
        self._passed = passed
        states = [state[p] for p in self.parameters]
        self.backend = choose_backend(options.backend, [p.detach() for p in self.parameters])
        tensors = Tensors(
            names=[f"parameter {n}" for n in range(len(states))],
            numbers=list(range(len(states))),
            groups=[2 * k + (n in rotated) for n, k in enumerate(group_of)],
            slots=passed,
            exp_avgs=[s["exp_avg"] for s in states],
            exp_avg_sqs=[s["exp_avg_sq"] for s in states],
            masters=[None] * len(states),
            steps=[s["step"] for s in states],
            mu_products=[s["mu_product"] for s in states] if has_mu_product else [],
            max_exp_avg_sqs=[None] * len(states),
        )
        self.plan = make_plan(self.backend, tensors)
        self.snapshot = Snapshot(groups, state, [p for slot in self.leaves for p in slot])

    def tell(self, slot: int) -> None:
        """Give the plan the gradients of a slot, and the rotated ones where the parameters have one."""
        for n, p in enumerate(self.leaves[slot]):
            rotated = self._gradients.get(n)
            self._passed[slot][n].grad = p.grad if rotated is None or p.grad is None else rotated


def _stacks(
    parameters: list[Tensor], group_of: list[int], groups: list[dict[str, Any]], state: dict[Any, dict[str, Any]]
) -> list[Stack]:
    alike: dict[Any, list[int]] = {}
    for n, (p, k) in enumerate(zip(parameters, group_of, strict=True)):
        sides = _sides(p, groups[k]["largest_side"])
        if sides:
            alike.setdefault((k, p.shape, p.device, state[p]["exp_avg"].dtype, sides), []).append(n)
    stacks = []
    for (k, shape, device, dtype, sides), numbers in alike.items():
        kept: dict[str, dict[int, Tensor]] = {"covariance": {}, "basis": {}}
        for name, by_side in kept.items():
            for side in sides:
                states = [state[parameters[n]] for n in numbers]
                by_side[side] = _side_by_side(states, f"{name}_{side}", shape[side], dtype, device)
        step = torch.zeros(len(numbers), *shape, dtype=dtype, device=device)
        stacks.append(Stack(k, numbers, kept["covariance"], kept["basis"], step, torch.zeros_like(step)))
    return stacks


def _side_by_side(
    states: list[dict[str, Any]], name: str, side: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Lay an entry of several states out in one stack, zeros where there is none, and return the stack."""
    stack = torch.zeros(len(states), side, side, dtype=dtype, device=device)
    for i, entries in enumerate(states):
        if name in entries:
            stack[i].copy_(entries[name])
        entries[name] = stack[i]
    return stack


def _sides(p: Tensor, largest: int) -> tuple[int, ...]:
    """Return the sides of a matrix that are rotated; none for other tensors."""
    return tuple(side for side in (0, 1) if 1 < p.shape[side] <= largest) if p.dim() == 2 else ()


def refresh(stack: Stack, states: list[dict[str, Any]]) -> None:
    """Take new bases: the second moments go with their columns, the first ones are rotated to the new bases."""
    m = torch.stack([s["exp_avg"] for s in states])
    v = torch.stack([s["exp_avg_sq"] for s in states])
    for side, basis in stack.bases.items():
        new, order = bases.next_basis(stack.covariances[side], basis)
        v = bases.permuted(v, order, side)
        m = bases.changed(m, basis, new, side)
        basis.copy_(new)
    for i, s in enumerate(states):
        s["exp_avg"].copy_(m[i])
        s["exp_avg_sq"].copy_(v[i])
