"""The cosine of Proposition 1, computed along recorded trajectories and measured through the ring."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import nesterov_pp as npp
from nesterov_pp.analysis import AlignmentMeter, cosine, linear_rule, lookahead_cosines, noise_cosine, simulate


def noisy_quadratic(momentum: float, delay: int, noise: float = 1.0) -> torch.Tensor:
    """Return a trajectory of 4,000 updates at lr 0.1 in 50 dimensions, with curvatures from 0.01 to 1."""
    draw = np.random.default_rng(0)
    curvature = np.geomspace(0.01, 1.0, 50)
    run = simulate(
        lambda w: curvature * w + noise * draw.standard_normal(50),
        draw.standard_normal(50),
        linear_rule("nag", momentum=momentum),
        step=0.1,
        delay=delay,
        updates=4000,
    )
    return torch.from_numpy(run.weights)


@pytest.mark.parametrize(("momentum", "expected"), [(0.5, 0.26), (0.99, 0.973)])
def test_the_cosines_that_were_found_before(momentum, expected):
    assert lookahead_cosines(noisy_quadratic(momentum, 7), 7)[500:].mean().item() == pytest.approx(expected, abs=0.03)


def test_the_cosine_tends_to_one_with_the_momentum():
    means = [lookahead_cosines(noisy_quadratic(g, 7), 7)[1000:].mean().item() for g in (0.5, 0.9, 0.99, 0.997)]
    assert means == sorted(means)
    assert means[-1] > 0.98


@pytest.mark.parametrize("delay", [1, 3, 7])
@pytest.mark.parametrize(
    "rule",
    [linear_rule("ema", momentum=0.9), linear_rule("nag", momentum=0.97), linear_rule("nadam", update=1000)],
    ids=["ema", "nag", "nadam at 1000"],
)
def test_noise_alone_gives_the_closed_form(rule, delay):
    """Run the recurrence in 2,000 dimensions on pure noise; compare its moment with the displacement that follows."""
    draw = np.random.default_rng(0)
    moments, points = [np.zeros(2000)], [np.zeros(2000)]
    for _ in range(1200):
        gradient = draw.standard_normal(2000)
        moments.append(rule.gamma * moments[-1] + (1 - rule.gamma) * gradient)
        points.append(points[-1] - rule.c_grad * gradient - rule.c_momentum * moments[-1])
    m, x = -np.stack(moments), np.stack(points)
    after = x[delay:] - x[:-delay]
    cosines = (
        (m[600:-delay] * after[600:]).sum(1)
        / np.linalg.norm(m[600:-delay], axis=1)
        / np.linalg.norm(after[600:], axis=1)
    )
    assert cosines.mean() == pytest.approx(noise_cosine(rule, delay), abs=0.01)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_the_proposition_s_w_is_the_average_without_look_ahead(momentum):
    """Along the w of Eq. 10, the cosine under noise is that of the rule "ema"."""
    draw = np.random.default_rng(0)
    rule = linear_rule("nag", momentum=momentum)
    run = simulate(lambda w: draw.standard_normal(2000), np.zeros(2000), rule, step=1.0, delay=0, updates=600)
    cosines = lookahead_cosines(torch.from_numpy(run.weights), 7)[300:]
    assert cosines.mean().item() == pytest.approx(noise_cosine(linear_rule("ema", momentum=momentum), 7), abs=0.01)


def test_a_trajectory_by_hand():
    """w = (0, 0), (1, 0), (1, 1), (3, 1): at delay 1, cos((1,1)-(1,0), (1,0)-(0,0)) = 0, then cos((2,0), (0,1)) = 0."""
    w = torch.tensor([[0.0, 0], [1, 0], [1, 1], [3, 1]])
    assert lookahead_cosines(w, 1).tolist() == [0.0, 0.0]
    assert lookahead_cosines(w, 2).tolist() == pytest.approx([2 / math.sqrt(5)])
    assert lookahead_cosines(w[[0, 0, 1]], 1).isnan().tolist() == [True]
    assert cosine([torch.tensor([3.0]), torch.tensor([4.0])], [torch.tensor([0.0]), torch.tensor([2.0])]) == 0.8
    assert math.isnan(cosine([torch.zeros(2)], [torch.ones(2)]))


def stage() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4)).double()


def microbatch(t: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(t)
    x = torch.randn(16, 6, generator=draw, dtype=torch.float64)
    return x, (x.abs().sum(dim=1) % 4).long()


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


RULES = {
    "nadam": lambda p, **o: npp.NAdam(p, lr=1e-2, betas=(0.9, 0.99), decoupled_weight_decay=True, **o),
    "adamw": lambda p, **o: npp.AdamW(p, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0, **o),
    "nag": lambda p, **o: npp.NAG(p, lr=0.1, momentum=0.9, **o),
    "upwards": lambda p, **o: npp.NAG(p, lr=0.01, momentum=0.9, maximize=True, **o),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("tau", "every"), [(1, 1), (3, 5), (3, 2)])
def test_the_meter_measures_what_full_copies_give(name, tau, every):
    """The expected look-ahead comes from moments computed here, the displacement from copies of all versions."""
    module = stage()
    stash = npp.WeightStash(module, versions=tau + 1)
    optimizer = RULES[name](module.parameters(), stash=stash)
    meter = AlignmentMeter(stash, optimizer, every)
    versions = [flat(module.parameters())]
    looks: dict[int, torch.Tensor] = {}
    m = v = torch.zeros_like(versions[0])
    sign = -1.0 if name == "upwards" else 1.0  # with maximize, the moments average the negated gradient
    begun, seen = None, {}
    for t in range(24):
        late = max(0, t - tau)
        with stash.use(late):
            x, y = microbatch(t)
            F.cross_entropy(module(x), y).backward()
        grad = flat(p.grad for p in stash.parameters(late).values())
        optimizer.step(version=late)
        m, v = 0.9 * m + 0.1 * sign * grad, 0.99 * v + 0.01 * grad**2
        versions.append(flat(stash.parameters(t + 1).values()))
        adaptive = name in ("nadam", "adamw")
        looks[t + 1] = -m / ((v / (1 - 0.99 ** (t + 1))).sqrt() + 1e-8 if adaptive else 1.0)
        expected = None
        if begun is not None and t + 1 == begun + tau:
            displacement = versions[t + 1] - versions[begun]
            expected = F.cosine_similarity(displacement, looks[begun], dim=0).item()
            begun = None
        if begun is None and (t + 1) % every == 0:
            begun = t + 1
        measured = meter.observe()
        assert (measured is None) == (expected is None)
        if expected is not None:
            assert measured == pytest.approx(expected, rel=1e-10)
            seen[t + 1] = measured
    assert len(set(seen.values())) == len(seen) >= 4


def test_a_meter_that_is_saved_goes_on():
    def train(meter, module, stash, optimizer, first, last):
        measured = []
        for t in range(first, last):
            with stash.use(max(0, t - 3)):
                x, y = microbatch(t)
                F.cross_entropy(module(x), y).backward()
            optimizer.step(version=max(0, t - 3))
            measured.append(meter.observe())
        return measured

    def build():
        module = stage()
        stash = npp.WeightStash(module, versions=4)
        optimizer = RULES["nadam"](module.parameters(), stash=stash)
        return AlignmentMeter(stash, optimizer, 5), module, stash, optimizer

    undisturbed = train(*build(), 0, 20)
    first = build()
    before = train(*first, 0, 11)
    saved = copy.deepcopy([part.state_dict() for part in (first[0], first[2], first[3])])
    assert saved[0]["version"] == 10
    second = build()
    for part, state in zip((second[2], second[3], second[0]), (saved[1], saved[2], saved[0]), strict=True):
        part.load_state_dict(state)
    assert before + train(*second, 11, 20) == undisturbed
    assert sum(c is not None for c in undisturbed) == 3


def test_a_saved_measurement_that_does_not_fit():
    module = stage()
    stash = npp.WeightStash(module, versions=2)
    meter = AlignmentMeter(stash, npp.NAG(module.parameters(), stash=stash), 1)
    with pytest.raises(ValueError, match="of a stage with other parameters"):
        meter.load_state_dict({"version": 0, "direction": [torch.zeros(3)]})
    good = [torch.zeros_like(p) for p in module.parameters()]
    meter.load_state_dict({"version": 5, "direction": good})  # this ring has no such version
    assert meter.state_dict() == {"version": None, "direction": []}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lookahead_cosines(torch.zeros(4, 2), 0), "delay must be at least 1, and .* not 0 and 4"),
        (lambda: lookahead_cosines(torch.zeros(4, 2), 3), "at least 5 points, not 3 and 4"),
        (lambda: noise_cosine(linear_rule(), 0), "delay must be at least 1, not 0"),
        (lambda: _meter(versions=1, every=1), "without a delay has no displacement"),
        (lambda: _meter(versions=2, every=0), "every must be at least 1 update, not 0"),
        (lambda: _meter_of(torch.optim.SGD(stage().parameters(), lr=1.0)), "without averages of its gradients"),
        (lambda: _meter_of(npp.NAG(stage().parameters())), "is not in the WeightStash"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _meter(versions: int, every: int) -> AlignmentMeter:
    module = stage()
    stash = npp.WeightStash(module, versions=versions)
    return AlignmentMeter(stash, npp.NAG(module.parameters(), stash=stash), every)


def _meter_of(optimizer: torch.optim.Optimizer) -> AlignmentMeter:
    return AlignmentMeter(npp.WeightStash(stage(), versions=2), optimizer)
