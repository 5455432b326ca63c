"""Every recipe compared, step by step, with its equations in float64 numpy (``oracles.py``)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import nn

from nesterov_pp.optim import DelayCompensation
from nesterov_pp.pipeline import Recipe, VirtualPipeline, find_recipe, recipes

STAGES, UPDATES, LR = 4, 60, 1e-2
CASES: dict[str, tuple[type[oracles.Stage], dict[str, Any]]] = {
    "nesterov": (oracles.NAdam, {}),
    "nesterov-rotated": (oracles.RotatedMean, {}),
    "pipedream-rotated": (oracles.RotatedAdamMean, {}),
    "nesterov-sgd": (oracles.Nesterov, {"lr": 1.0}),
    "nesterov-horizon": (oracles.GrowingHorizon, {"correction_updates": 20}),
    "pipedream": (oracles.Adam, {}),
    "pipedream-lr": (oracles.Discounted, {"correction_updates": 20}),
    "pipedream-2bw": (oracles.Adam, {}),
    "one-step-ef": (oracles.ErrorFeedback, {"weight_decay": 0.0}),
    "one-step-ef-nadam": (oracles.ErrorFeedbackNAdam, {"weight_decay": 0.0}),
    "pipemare": (oracles.PipeMare, {"correction_updates": 20}),
    "xpipe": (oracles.XPipe, {}),
    "spectrain": (oracles.SpecTrain, {"lr": 0.3}),
    "lwp": (oracles.LastDisplacement, {}),
    "staleness-aware": (oracles.StalenessAware, {}),
    "dc-asgd": (oracles.DelayCompensated, {}),
    "gap-aware": (oracles.GapAware, {}),
    "lr-second-order": (oracles.DiscountedCompensated, {"correction_updates": 20}),
    "poly-forecast": (oracles.Polynomial, {"correction_updates": 20}),
    "fft-forecast": (oracles.Fourier, {"correction_updates": 20}),
    "dana-zero": (oracles.DanaZero, {"lr": 0.3}),
    "dana-slim": (oracles.DanaSlim, {"lr": 0.3}),
    "dana-dc": (oracles.DanaDc, {"lr": 0.3}),
    "paci": (oracles.NewestBackward, {"microbatches_per_update": 3}),
    "gba": (oracles.Adam, {}),
    "basis-rotation": (oracles.Rotated, {}),
    "basis-rotation-1st-uni": (oracles.RotatedLight, {}),
    "nesterov-no-stash": (oracles.NoStash, {"correction_updates": 20}),
    "swarm": (oracles.NoStash, {"correction_updates": 20}),
}
"""All methods except the undelayed ones and ``one-step-ef-muon``, whose oracle is a loop in torch."""


@pytest.fixture(autouse=True)
def float64_scalars():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def modules(stages: int) -> list[nn.Module]:
    made: list[nn.Module] = []
    for i in range(stages):
        w = torch.from_numpy(oracles.first_weights(i))
        linear = nn.Linear(oracles.WIDTH, oracles.WIDTH)
        with torch.no_grad():
            linear.weight.copy_(w[: -oracles.WIDTH].view(oracles.WIDTH, oracles.WIDTH))
            linear.bias.copy_(w[-oracles.WIDTH :])
        made.append(nn.Sequential(linear, nn.Tanh()) if i < stages - 1 else nn.Sequential(linear))
    return made


def batch(m: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = oracles.microbatch(m)
    return torch.from_numpy(x), torch.from_numpy(y)


def run_both(
    recipe: str | Recipe, oracle: type[oracles.Stage], options: dict[str, Any], updates: int = UPDATES
) -> tuple[list[float], list[float], VirtualPipeline, list[oracles.Stage]]:
    options = {"lr": LR, **options}
    pipe = VirtualPipeline(modules(STAGES), nn.functional.mse_loss, method=recipe, **options)
    k = pipe.microbatches_per_update
    ours = [float(pipe.step(*batch(m))) for m in range(updates * k)]
    expected = pipe.delay_model.expected
    stages = [oracle(oracles.first_weights(i), tau, options["lr"]) for i, tau in enumerate(expected)]
    for i, stage in enumerate(stages):
        if isinstance(stage, oracles.NoStash):
            stage.place, stage.stages = i + 1, STAGES
    theirs = oracles.train(stages, pipe.delay_model.draw, updates * k, k, pipe.recipe.max_staleness)
    return ours, theirs, pipe, stages


def assert_agree(ours: list[float], theirs: list[float], pipe: VirtualPipeline, stages: list[oracles.Stage]) -> None:
    assert ours == pytest.approx(theirs, rel=1e-8)
    assert ours[-1] != pytest.approx(ours[0], rel=1e-3), "nothing was learnt"
    for stash, stage in zip(pipe.stashes, stages, strict=True):
        w = torch.cat([p.detach().flatten() for p in stash.parameters(stash.newest).values()]).numpy()
        np.testing.assert_allclose(w, stage.forward[-1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_the_recipe_is_its_equations(name):
    oracle, options = CASES[name]
    assert_agree(*run_both(name, oracle, options))


@pytest.mark.parametrize(
    "name", ["nesterov-horizon", "pipemare", "xpipe", "lwp", "dc-asgd", "gap-aware", "poly-forecast", "basis-rotation"]
)
def test_an_oracle_notices_that_the_correction_is_missing(name):
    """A method without its correction is far away from its oracle, so the tests above can fail."""
    base = "nesterov" if name.startswith("nesterov") else "pipedream"
    oracle, options = CASES[name]
    plain = {k: v for k, v in options.items() if k != "correction_updates"}
    ours, _, _, _ = run_both(base, oracle, plain)
    _, theirs, _, _ = run_both(name, oracle, options)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > 1e-6


def test_muon_with_error_feedback_is_a_loop_in_torch():
    """Run forward at x = w + (w - previous w), one update late, with Muon for the matrices and AdamW for the biases."""
    weights = modules(STAGES)
    matrices = [p for p in nn.ModuleList(weights).parameters() if p.dim() == 2]
    rest = [p for p in nn.ModuleList(weights).parameters() if p.dim() < 2]
    inner = [
        torch.optim.Muon(matrices, lr=LR, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01),
    ]
    versions, losses = [copy.deepcopy(weights)], []
    for t in range(20):
        late = versions[max(0, t - 1)]
        for m in range(t * STAGES, (t + 1) * STAGES):
            x, y = batch(m)
            loss = nn.functional.mse_loss(nn.Sequential(*late)(x), y)
            loss.backward()
            losses.append(loss.item())
        before = copy.deepcopy(weights)
        for p, q in zip(nn.ModuleList(weights).parameters(), nn.ModuleList(late).parameters(), strict=True):
            p.grad, q.grad = q.grad / STAGES, None
        for optimizer in inner:
            optimizer.step()
        versions.append(copy.deepcopy(weights))
        with torch.no_grad():
            triples = (nn.ModuleList(part).parameters() for part in (versions[-1], weights, before))
            for ahead, w, last in zip(*triples, strict=True):
                ahead.copy_(w + (w - last))

    def played(**overrides: Any) -> list[float]:
        pipe = VirtualPipeline(modules(STAGES), nn.functional.mse_loss, "one-step-ef-muon", LR, **overrides)
        return [float(pipe.step(*batch(m))) for m in range(len(losses))]

    assert played() == losses != played(horizon=0.0)


def test_the_adaptive_compensation():
    recipe = replace(
        find_recipe("dc-asgd"),
        options={**find_recipe("dc-asgd").options, "correction": DelayCompensation(2.0, adaptive=True)},
    )
    assert_agree(*run_both(recipe, oracles.AdaptivelyCompensated, {}))


@pytest.mark.parametrize("horizon", [1.0, 3.0])
def test_a_horizon_in_the_step_is_a_prediction_beside_it(horizon):
    """``NAG`` with a horizon keeps one copy of the weights; the literal form keeps w and x = w - lr (gamma + ...) m."""

    class Literal(oracles.Momentum):
        gamma = 0.9

        def ahead(self) -> oracles.Array:
            return self.w - self.lr * sum(self.gamma**k for k in range(1, round(horizon) + 1)) * self.m

    recipe = replace(
        find_recipe("nesterov-sgd"),
        options={"momentum": 0.9, "weight_decay": 0.0},
        horizon=lambda _place, _update, _t: horizon,
    )
    assert_agree(*run_both(recipe, Literal, {"lr": 0.3}))


@pytest.mark.parametrize("name", ["xpipe", "lwp", "dana-dc"])
def test_a_model_is_judged_by_its_weights_and_not_by_predictions(name):
    oracle, options = CASES[name]
    _, _, pipe, stages = run_both(name, oracle, options)
    x, _ = oracles.microbatch(999)

    def output(weights: list[oracles.Array]) -> oracles.Array:
        hidden = x
        for i, w in enumerate(weights):
            hidden = hidden @ w[: -oracles.WIDTH].reshape(oracles.WIDTH, oracles.WIDTH).T + w[-oracles.WIDTH :]
            hidden = np.tanh(hidden) if i < STAGES - 1 else hidden
        return hidden

    predicted = pipe.predict(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(predicted, output([stage.w for stage in stages]), rtol=1e-7)
    assert np.abs(predicted - output([stage.forward[-1] for stage in stages])).max() > 1e-4
    again = nn.Sequential(*pipe.stages)(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(again, output([stage.forward[-1] for stage in stages]), rtol=1e-7)


RATES = {"nesterov-sgd": 1.0, "spectrain": 0.3, "dana-zero": 0.3, "dana-slim": 0.3, "dana-dc": 0.3}


@pytest.mark.parametrize("name", recipes())
def test_every_method_learns_in_spite_of_the_delay(name):
    late = {"correction_updates": 30} if recipes()[name].correction_updates else {}
    pipe = VirtualPipeline(modules(STAGES), nn.functional.mse_loss, method=name, lr=RATES.get(name, LR), **late)
    x, y = (torch.cat(parts) for parts in zip(*(batch(10_000 + m) for m in range(50)), strict=True))
    before = float(pipe.evaluate(x, y))
    for m in range(200 * pipe.microbatches_per_update):
        pipe.step(*batch(m))
    assert float(pipe.evaluate(x, y)) < 0.7 * before


UNDELAYED = {
    "nesterov": ["nesterov-horizon", "one-step-ef-nadam"],
    "pipedream": [
        "pipedream-lr",
        "pipedream-2bw",
        "one-step-ef",
        "pipemare",
        "xpipe",
        "lwp",
        "staleness-aware",
        "dc-asgd",
        "gap-aware",
        "lr-second-order",
        "poly-forecast",
        "fft-forecast",
        "gba",
        "gpipe-1",
    ],
    "nesterov-sgd": ["dana-slim"],
    "spectrain": ["dana-zero", "dana-dc"],
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("base", "name"), [(base, name) for base, names in UNDELAYED.items() for name in names])
def test_with_one_stage_nothing_is_corrected_bit_for_bit(base, name, dtype, backend):
    """With one stage, a method is only its rule and equals the undelayed run of another method with the same rule."""
    losses = []
    rule = {"momentum": 0.9, "weight_decay": 1e-4} if base in ("nesterov-sgd", "spectrain") else {}
    for method in (base, name):
        whole = nn.Sequential(*modules(3)).to(dtype)
        options = {**rule, "microbatches_per_update": 2, "backend": backend}
        pipe = VirtualPipeline([whole], nn.functional.mse_loss, method=method, lr=1e-2, **options)
        run = [pipe.step(*(t.to(dtype) for t in batch(m))) for m in range(40)]
        losses.append([*run, *(p.detach() for p in pipe.stashes[0].weights().values())])
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    assert not torch.equal(losses[0][-1][0], torch.from_numpy(oracles.first_weights(2)[-oracles.WIDTH :]).to(dtype)[0])
