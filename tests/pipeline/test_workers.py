"""Asynchronous workers around a server, compared with their equations in numpy on a least-squares problem."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nesterov_pp.pipeline import Swarm, VirtualWorkers
from nesterov_pp.pipeline.workers import METHODS

SIZE, LR, GAMMA, STRENGTH = 4, 0.02, 0.9, 0.03


@pytest.fixture(autouse=True)
def float64_scalars():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def data(m: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(m)
    x = rng.standard_normal((8, SIZE))
    return x, x @ np.arange(1.0, SIZE + 1.0)[:, None] + 0.1 * rng.standard_normal((8, 1))


def model() -> nn.Module:
    linear = nn.Linear(SIZE, 1, bias=False)
    with torch.no_grad():
        linear.weight.zero_()
    return linear


def run(method: str, workers, steps: int = 60, **options) -> tuple[list[float], np.ndarray]:
    module = model()
    virtual = VirtualWorkers(module, nn.functional.mse_loss, method, workers, LR, **options)
    losses = [float(virtual.step(*map(torch.from_numpy, data(m)))) for m in range(steps)]
    return losses, module.weight.detach().numpy().ravel().copy()


def oracle(method: str, workers: int, steps: int = 60) -> tuple[list[float], np.ndarray]:
    """Train with equal workers that take turns."""
    theta = np.zeros(SIZE)
    sent = [(theta.copy(), 0) for _ in range(workers)]
    v = np.zeros((workers if method.startswith("dana") else 1, SIZE))
    mean, losses = np.zeros(SIZE), []
    for m in range(steps):
        i = m % workers
        s, since = sent[i]
        x, y = data(m)
        residual = x @ s - y[:, 0]
        losses.append(float(np.mean(residual**2)))
        g = 2 * x.T @ residual / len(x)
        mine = v[i if len(v) > 1 else 0]
        if method in ("dc-asgd", "dana-dc"):
            g = g + STRENGTH * g**2 * (theta - s)
        if method == "gap-aware":
            size = np.sqrt(mean / (1 - 0.999**m)) if m else np.zeros(SIZE)
            g = g / (1 + np.abs(theta - s) / (LR * (size + 1e-8)))
        if method in ("asgd", "dc-asgd"):
            theta = theta - LR * g
        elif method == "staleness-aware":
            theta = theta - LR / max(1, m - since) * g
        else:
            mine[:] = GAMMA * mine + g
            mean = 0.999 * mean + 0.001 * mine**2
            theta = theta - LR * (GAMMA * mine + g if method in ("nag-asgd", "dana-slim") else mine)
        ahead = LR * GAMMA * v.sum(0) if method in ("dana-zero", "dana-dc") else 0.0
        sent[i] = (theta - ahead, m + 1)
    return losses, theta


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "gba"])
def test_methods_are_their_equations(method, workers):
    losses, theta = run(method, workers, strength=STRENGTH)
    expected, weights = oracle(method, workers)
    assert losses == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(theta, weights, rtol=1e-10)


def test_dana_slim_sends_what_dana_zero_sends():
    """The paper's identity: the slim form keeps the look-ahead point in place of theta, where losses are computed."""
    assert run("dana-zero", 5)[0] == pytest.approx(run("dana-slim", 5)[0], rel=1e-10)
    assert run("dana-zero", 5)[0] != pytest.approx(run("nag-asgd", 5)[0], rel=1e-3)


def test_dana_with_one_worker_is_nesterov():
    w, v, losses = np.zeros(SIZE), np.zeros(SIZE), []
    for m in range(60):
        x, y = data(m)
        ahead = w - LR * GAMMA * v
        losses.append(float(np.mean((x @ ahead - y[:, 0]) ** 2)))
        v = GAMMA * v + 2 * x.T @ (x @ ahead - y[:, 0]) / len(x)
        w = w - LR * v
    assert run("dana-zero", 1)[0] == pytest.approx(losses, rel=1e-10)


def large_batch(steps: int, m: int) -> np.ndarray:
    w, v = np.zeros(SIZE), np.zeros(SIZE)
    for k in range(steps // m):
        grads = []
        for j in range(m):
            x, y = data(k * m + j)
            grads.append(2 * x.T @ (x @ w - y[:, 0]) / len(x))
        v = GAMMA * v + np.mean(grads, 0)
        w = w - LR * v
    return w


def test_gba_that_waits_is_training_with_the_global_batch():
    np.testing.assert_allclose(run("gba", 4, synchronous=True)[1], large_batch(60, 4), rtol=1e-10)


def test_gba_weights_gradients_by_their_tokens():
    """One of two workers is 9 times as fast, an update has 4 gradients: the slow one's are too late and count as 0."""
    speeds, m, limit = [9.0, 1.0], 4, 1
    theta, v, updates = np.zeros(SIZE), np.zeros(SIZE), 0
    dealt = 2
    sent = [(0, theta), (0, theta)]
    buffer: list[tuple[int, np.ndarray]] = []
    times, dropped = [1 / speed for speed in speeds], 0
    for n in range(60):
        i = int(np.argmin(times))
        times[i] += 1 / speeds[i]
        token, s = sent[i]
        x, y = data(n)
        buffer.append((token, 2 * x.T @ (x @ s - y[:, 0]) / len(x)))
        if len(buffer) == m:
            dropped += sum(updates - token > limit for token, _ in buffer)
            v = GAMMA * v + sum((g for token, g in buffer if updates - token <= limit), np.zeros(SIZE)) / m
            theta = theta - LR * v
            updates, buffer = updates + 1, []
        sent[i] = (dealt // m, theta)
        dealt += 1
    assert dropped > 3
    np.testing.assert_allclose(run("gba", speeds, global_batch=4, max_staleness=limit)[1], theta, rtol=1e-10)


def test_gba_switches_between_waiting_and_not_within_a_run():
    """A run that waits half of the time ends near a run that always waits, with the same hyper-parameters."""
    module = model()
    virtual = VirtualWorkers(module, nn.functional.mse_loss, "gba", 4, LR)
    for m in range(800):
        virtual.synchronous = (m // 100) % 2 == 1
        virtual.step(*map(torch.from_numpy, data(m)))
    assert virtual.updates == 200
    gap = np.abs(module.weight.detach().numpy().ravel() - np.arange(1.0, SIZE + 1.0)).max()
    assert gap < 0.1
    assert np.abs(large_batch(800, 4) - np.arange(1.0, SIZE + 1.0)).max() < 0.1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "adam", "workers": 2}, "unknown method 'adam'"),
        ({"method": "asgd", "workers": 0}, "workers must be at least 1"),
        ({"method": "asgd", "workers": [1.0, -1.0]}, "speeds above 0"),
        ({"method": "asgd", "workers": 2, "synchronous": True}, "has no synchronous form"),
        ({"method": "gba", "workers": 2, "global_batch": 0}, "global_batch must be at least 1"),
    ],
)
def test_bad_arguments(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        VirtualWorkers(model(), nn.functional.mse_loss, lr=LR, **options)


def test_a_swarm_of_one_equal_worker_a_stage_is_a_pipeline():
    """One microbatch in flight means no delay. With as many as the pipeline holds, the first stage is the latest."""
    alone = Swarm(((1.0,),) * 4, in_flight=1, cut=8)
    assert {tuple(alone.draw(m)) for m in range(50)} == {(0, 0, 0, 0)}
    full = Swarm(((1.0,),) * 4, in_flight=4, cut=8)
    rows = [full.draw(m) for m in range(20, 60)]
    assert all(row == sorted(row, reverse=True) and row[-1] == 0 for row in rows)
    assert max(row[0] for row in rows) == 3


def test_a_swarm_loses_microbatches_with_its_workers_only():
    team = ((1.0, 0.5, 0.25),) * 3
    stays = Swarm(team, in_flight=6, cut=30)
    assert all(stays.draw(m) is not None for m in range(500))
    leaves = Swarm(team, in_flight=6, cut=30, mean_up=50.0, mean_down=50.0, seed=1)
    lost = sum(leaves.draw(m) is None for m in range(500))
    assert 5 < lost < 150
    # Workers are away half of the time, so fewer microbatches are under way, and none is later than the cut.
    assert all(max(row) <= 30 for row in (leaves.draw(m) for m in range(500)) if row is not None)
    again = Swarm(team, in_flight=6, cut=30, mean_up=50.0, mean_down=50.0, seed=1)
    assert [leaves.draw(m) for m in range(50)] == [again.draw(m) for m in range(50)]
    with pytest.raises(ValueError, match="a speed above 0"):
        Swarm(((),), in_flight=1, cut=1)


def test_a_worker_of_a_hundredth_of_the_speed_gets_a_hundredth_of_the_microbatches():
    """The slow worker's microbatches are too late and lost; picking workers uniformly would lose half of all."""
    swarm = Swarm(((1.0, 0.01), (1.0,)), in_flight=6, cut=20)
    lost = sum(swarm.draw(m) is None for m in range(1000))
    assert 2 <= lost <= 20
