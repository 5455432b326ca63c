"""What a rotated step goes over: stacks of matrices with their bases, and one pass over all parameters."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nesterov_pp.kernels import Tensors, choose_backend, make_plan
from nesterov_pp.optim import bases
from nesterov_pp.optim.fresh import MasterWeights, masters_of
from nesterov_pp.optim.options import Options
from nesterov_pp.optim.prepared import Snapshot


@dataclass(frozen=True)
class Matrix:
    """A matrix in a stack: its number among the parameters, and where its ``rows x columns`` blocks lie."""

    number: int
    first: int
    rows: int
    columns: int

    @property
    def blocks(self) -> slice:
        return slice(self.first, self.first + self.rows * self.columns)

    def cut(self, t: Tensor) -> Tensor:
        """Return a matrix's blocks, ``[rows, columns, m, n]``, as a view."""
        m, n = t.shape
        return t.view(self.rows, m // self.rows, self.columns, n // self.columns).transpose(1, 2)


@dataclass
class Stack:
    """The blocks of matrices that have one group, block shape and dtype, and what is kept side by side for them.

    ``step`` receives what the pass takes from zeros, and ``gradients`` are the rotated gradients that the pass reads,
    then the step in the weights' coordinates. ``cut_gradients`` are its blocks by matrix, as ``Matrix.cut`` returns
    them.
    """

    group: int
    matrices: list[Matrix]
    covariances: dict[int, Tensor]
    bases: dict[int, Tensor]
    step: Tensor
    gradients: Tensor
    cut_gradients: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        shape = self.gradients.shape[1:]
        self.cut_gradients = [self.gradients[m.blocks].view(m.rows, m.columns, *shape) for m in self.matrices]

    def part(self, matrix: Matrix) -> Stack:
        """Return one of the matrices."""
        return Stack(
            self.group,
            [replace(matrix, first=0)],
            {side: t[matrix.blocks] for side, t in self.covariances.items()},
            {side: t[matrix.blocks] for side, t in self.bases.items()},
            self.step[matrix.blocks],
            self.gradients[matrix.blocks],
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
            for matrix in stack.matrices:
                n = matrix.number
                rotated.add(n)
                self._gradients[n] = stack.gradients[matrix.blocks].view(self.parameters[n].shape)
                step = stack.step[matrix.blocks].view(self.parameters[n].shape).detach()
                for slot in passed:
                    slot[n] = step
        self._passed = passed
        self._rotated = rotated
        self.cut_weights: list[dict[int, Tensor]] = [{} for _ in self.leaves]
        for number in range(len(self.leaves)):
            self.follow(number)
        states = [state[p] for p in self.parameters]
        newest = self.leaves[0] if stash is None else self.leaves[stash.slot_of(stash.newest)]
        masters = masters_of(states, newest, options)
        for s, master in zip(states, masters, strict=True):
            s.update({} if master is None else {"master_weight": master})
        self.masters = MasterWeights(self.leaves, masters)
        self.cut_masters = {
            m.number: m.cut(master)
            for m in (m for stack in self.stacks for m in stack.matrices)
            if (master := masters[m.number]) is not None
        }
        self.backend = choose_backend(options.backend, [p.detach() for p in self.parameters])
        tensors = Tensors(
            names=[f"parameter {n}" for n in range(len(states))],
            numbers=list(range(len(states))),
            groups=[2 * k + (n in rotated) for n, k in enumerate(group_of)],
            slots=passed,
            exp_avgs=[s["exp_avg"] for s in states],
            exp_avg_sqs=[s["exp_avg_sq"] for s in states],
            masters=[None if n in rotated else master for n, master in enumerate(masters)],
            steps=[s["step"] for s in states],
            mu_products=[s["mu_product"] for s in states] if has_mu_product else [],
            max_exp_avg_sqs=[None] * len(states),
        )
        self.plan = make_plan(self.backend, tensors)
        self.snapshot = Snapshot(groups, state, [p for slot in self.leaves for p in slot])

    def follow(self, slot: int) -> None:
        """Take the memory that the leaves of a slot have now; a ring may lend them other (stash/old_versions.py)."""
        leaves = self.leaves[slot]
        for n, (leaf, passed) in enumerate(zip(leaves, self._passed[slot], strict=True)):
            if n not in self._rotated and passed.data_ptr() != leaf.data_ptr():
                passed.data = leaf.detach()
        matrices = [matrix for stack in self.stacks for matrix in stack.matrices]
        self.cut_weights[slot] = {m.number: m.cut(leaves[m.number].detach()) for m in matrices}

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
        if p.dim() != 2:
            continue
        shape = tuple(block_side(length, groups[k]["block_size"]) for length in p.shape)
        sides = tuple(side for side in (0, 1) if 1 < shape[side] <= groups[k]["block_size"])
        if sides:
            alike.setdefault((k, shape, p.device, state[p]["exp_avg"].dtype, sides), []).append(n)
    stacks = []
    for (k, shape, device, dtype, sides), numbers in alike.items():
        matrices, count = [], 0
        for n in numbers:
            rows, columns = (length // side for length, side in zip(parameters[n].shape, shape, strict=True))
            matrices.append(Matrix(n, count, rows, columns))
            count += rows * columns
        for entries in (state[parameters[n]] for n in numbers):
            # They lie block by block, so not in the order of a parameter that is a transposed view.
            entries.update({name: entries[name].contiguous() for name in ("exp_avg", "exp_avg_sq")})
        kept: dict[str, dict[int, Tensor]] = {"covariance": {}, "basis": {}}
        for name, by_side in kept.items():
            for side in sides:
                by_side[side] = torch.zeros(count, shape[side], shape[side], dtype=dtype, device=device)
                for matrix in matrices:
                    _move(state[parameters[matrix.number]], f"{name}_{side}", by_side[side][matrix.blocks])
        step = torch.zeros(count, *shape, dtype=dtype, device=device)
        stacks.append(Stack(k, matrices, kept["covariance"], kept["basis"], step, torch.zeros_like(step)))
    return stacks


def _move(entries: dict[str, Any], name: str, to: Tensor) -> None:
    """Move an entry of a state to its place in a stack."""
    place = to if len(to) > 1 else to[0]
    if name in entries:
        place.copy_(entries[name])
    entries[name] = place


def block_side(length: int, largest: int) -> int:
    """Return the side of the blocks: the greatest divisor of ``length`` from half of ``largest`` to ``largest``.

    If there is none, the side is not cut (and not rotated either, if it is longer than ``largest``).
    """
    return next(
        (length // k for k in range(-(-length // largest), 2 * length // largest + 1) if length % k == 0), length
    )


def refresh(stack: Stack, states: list[dict[str, Any]]) -> None:
    """Take new bases: the second moments go with their columns, the first ones are rotated to the new bases."""
    shape = (-1, *stack.step.shape[1:])
    m = torch.cat([s["exp_avg"].view(shape) for s in states])
    v = torch.cat([s["exp_avg_sq"].view(shape) for s in states])
    for side, basis in stack.bases.items():
        new, order = bases.next_basis(stack.covariances[side], basis)
        v = bases.permuted(v, order, side)
        m = bases.changed(m, basis, new, side)
        basis.copy_(new)
    for s, matrix in zip(states, stack.matrices, strict=True):
        s["exp_avg"].view(shape).copy_(m[matrix.blocks])
        s["exp_avg_sq"].view(shape).copy_(v[matrix.blocks])
