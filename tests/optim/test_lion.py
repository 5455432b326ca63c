"""Lion compared with its paper's algorithm in plain torch."""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS
from tolerances import ULPS, ulps_apart
from torch import nn

import nesterov_pp as npp
from nesterov_pp.optim import FusedOptimizer

LR, BETAS, DECAY = 1e-3, (0.9, 0.99), 0.1


@torch.no_grad()
def paper_step(p: torch.Tensor, m: torch.Tensor, g: torch.Tensor, *, lr: float = LR, decay: float = DECAY) -> None:
    """Algorithm 2 of arXiv 2302.06675."""
    update = (BETAS[0] * m + (1.0 - BETAS[0]) * g).sign()
    p.copy_(p - (lr * decay * p + lr * update))
    m.mul_(BETAS[1]).add_(g, alpha=1.0 - BETAS[1])


def gradients(shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(steps)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_steps_are_the_papers(dtype, backend):
    p = nn.Parameter(gradients((37, 41), 1, dtype)[0].clone())
    expected, m = p.detach().clone(), torch.zeros_like(p.detach())
    optimizer = npp.Lion([p], lr=LR, betas=BETAS, weight_decay=DECAY, backend=backend)
    for g in gradients((37, 41), 20, dtype):
        p.grad = g.clone()
        optimizer.step()
        paper_step(expected, m, g)
    # A momentum that nearly cancels may change its sign with different rounding.
    close = (p - expected).abs() <= 20 * torch.finfo(dtype).eps * (1.0 + expected.abs())
    assert close.float().mean() > 0.999
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], m, rtol=1e-5, atol=1e-7)
    assert list(optimizer.state[p]) == ["step", "exp_avg"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_element_moves_by_lr_and_none_by_a_gradient_of_nothing(backend):
    p = nn.Parameter(torch.zeros(5))
    optimizer = npp.Lion([p], lr=0.5, backend=backend)
    p.grad = torch.tensor([1e-30, -1e30, 0.0, 3.0, float("nan")])
    optimizer.step()
    assert p[:4].tolist() == [-0.5, 0.5, 0.0, -0.5]
    assert p[4].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"master_weights": True}, {"state_dtype": torch.float32}, {"stochastic_rounding": True}],
    ids=lambda o: next(iter(o), "plain"),
)
def test_bfloat16(options, backend):
    p = nn.Parameter(gradients((1000,), 1, torch.bfloat16)[0].clone())
    expected, m = p.detach().float(), torch.zeros(1000)
    optimizer = npp.Lion([p], lr=LR, betas=BETAS, weight_decay=DECAY, backend=backend, **options)
    g = gradients((1000,), 2, torch.bfloat16)[1]
    p.grad = g.clone()
    optimizer.step()
    paper_step(expected, m, g.float())
    assert ulps_apart(p.detach(), expected.bfloat16()) <= ULPS[torch.bfloat16]


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_a_ring_a_late_step_is_that_of_one_copy(backend):
    torch.manual_seed(0)
    module = nn.Linear(30, 20)
    p = [t.detach().clone() for t in module.parameters()]
    m = [torch.zeros_like(t) for t in p]
    stash = npp.WeightStash(module, 3)
    optimizer = npp.Lion(module.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, stash=stash, backend=backend)
    for _ in range(6):
        late = max(0, stash.newest - 2)
        grads = [torch.randn_like(t) for t in p]
        for leaf, g in zip(stash.parameters(late).values(), grads, strict=True):
            leaf.grad = g.clone()
        optimizer.step(version=late)
        for w, momentum, g in zip(p, m, grads, strict=True):
            paper_step(w, momentum, g)
    for leaf, w in zip(stash.weights().values(), p, strict=True):
        torch.testing.assert_close(leaf, w, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_learns_and_goes_on_after_a_checkpoint(backend):
    def made() -> tuple[nn.Module, FusedOptimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
        return model, npp.Lion(model.parameters(), lr=3e-3, max_grad_norm=1.0, backend=backend)

    def train(model: nn.Module, optimizer: FusedOptimizer, seeds: range) -> list[float]:
        losses = []
        for seed in seeds:
            x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            loss = (model(x).squeeze(1) - x.square().sum(1) / 8).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model, optimizer = made()
    losses = train(model, optimizer, range(60))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    first, second = made(), made()
    train(*first, range(30))
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    train(*second, range(30, 60))
    for a, b in zip(model.parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"betas": (1.0, 0.99)}, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": 0.9}, "Invalid betas: 0.9; they must be a pair of numbers"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
    ],
)
def test_bad_hyper_parameters(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        npp.Lion(nn.Linear(2, 2).parameters(), **options)
