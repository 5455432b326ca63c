"""Late gradients in the eigenbasis of the Hessian and in another one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import nesterov_pp as npp
from nesterov_pp.analysis import late_on_a_quadratic, max_stable_step, preconditioned_curvature
from nesterov_pp.analysis.rules import linear_rule

DELAY = 7


def turned_quadratic(n: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Return a Hessian with curvatures from 1 to 1/100, and its eigenvectors, which mix all coordinates."""
    vectors = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    return vectors @ np.diag(np.logspace(0, -2, n)) @ vectors.T, vectors


def test_the_curvature_that_a_basis_leaves():
    hessian, vectors = turned_quadratic()
    h = np.linalg.eigvalsh(hessian)
    assert preconditioned_curvature(hessian, hessian, vectors) == pytest.approx(np.sqrt(h.max()))
    hadamard = np.array([[1.0]])
    for _ in range(3):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    mixed = hadamard / np.sqrt(8) @ np.diag(h) @ hadamard.T / np.sqrt(8)
    assert preconditioned_curvature(mixed, mixed) == pytest.approx(h.max() / np.sqrt(h.mean()))


@pytest.mark.parametrize("in_eigenbasis", [False, True])
@pytest.mark.parametrize(("share", "stable"), [(0.97, True), (1.03, False)])
def test_the_edge_is_that_of_the_preconditioned_curvature(in_eigenbasis: bool, share: float, stable: bool):
    hessian, vectors = turned_quadratic()
    basis = vectors if in_eigenbasis else np.eye(len(hessian))
    edge = max_stable_step("nag", momentum=0.9, delay=DELAY)
    lr = share * edge / preconditioned_curvature(hessian, hessian, basis)
    rule, scale = linear_rule("nag", momentum=0.9), 1.0 / np.sqrt(np.diag(basis.T @ hessian @ basis))
    ring, m = [np.ones(len(hessian))] * (DELAY + 1), np.zeros(len(hessian))
    for _ in range(6000):
        g = hessian @ ring[0]
        m = rule.gamma * m + (1.0 - rule.gamma) * g
        step = basis @ (scale * (basis.T @ (rule.c_grad * g + rule.c_momentum * m)))
        ring = [*ring[1:], ring[-1] - lr * step]
    assert bool(np.abs(ring[-1]).max() < 1.0) == stable


def nadam(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    return npp.NAdam(parameters, lr=lr, betas=(0.99, 0.99), decoupled_weight_decay=True)


def rotated(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    return npp.RotatedNAdam(parameters, lr=lr, weight_decay=0.0)


def test_a_delay_hurts_the_plain_rule_only_where_the_basis_is_not_its_own():
    """The best of three rates each; the rotated rule takes no notice of how the problem lies."""

    def best(rule: Callable[..., Optimizer], turned: bool) -> float:
        rates = (0.01, 0.03, 0.1)
        return min(late_on_a_quadratic(lambda p, lr=lr: rule(p, lr), delay=31, turned=turned) for lr in rates)

    torch.set_num_threads(1)
    assert best(nadam, turned=True) > 10 * best(nadam, turned=False)
    assert best(rotated, turned=True) == pytest.approx(best(rotated, turned=False), rel=0.05)
    assert best(rotated, turned=True) < 2 * best(nadam, turned=False)
