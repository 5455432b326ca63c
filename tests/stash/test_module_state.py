"""The state of a module whose ring holds predictions is that of its stepped weights."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nesterov_pp import NAdam, WeightStash
from nesterov_pp.optim import Prediction
from nesterov_pp.pipeline import VirtualPipeline, recipes

PREDICTING = [name for name, recipe in recipes().items() if recipe.shadow == "stepped"]


def stages() -> list[nn.Module]:
    torch.manual_seed(0)
    tied = nn.Linear(6, 6)
    return [nn.Sequential(tied, nn.Tanh(), nn.BatchNorm1d(6), tied), nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 3)]


def trained(method: str, updates: int = 5, **options: Any) -> VirtualPipeline:
    pipe = VirtualPipeline(stages(), F.cross_entropy, method, lr=1e-2, **options)
    torch.manual_seed(1)
    for _ in range(updates * pipe.microbatches_per_update):
        pipe.step(torch.randn(4, 6), torch.randint(3, (4,)))
    return pipe


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


def stepped_ring(delay: int = 2) -> tuple[nn.Sequential, WeightStash, NAdam]:
    """Return a module, its ring and its optimizer after steps that predict; the predictions differ from the weights."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    stash = WeightStash(module, delay + 1, shadow="stepped")
    optimizer = NAdam(module.parameters(), lr=1e-2, stash=stash, prediction=Prediction("momentum"))
    for group in optimizer.param_groups:
        group["horizon"] = 2.0
    step(module, optimizer, 4)
    return module, stash, optimizer


def step(module: nn.Module, optimizer: NAdam, times: int = 1) -> None:
    for k in range(times):
        module(torch.ones(3, 4) * k).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("method", PREDICTING)
def test_every_recipe_that_predicts(method: str) -> None:
    pipe = trained(method)
    inputs = torch.randn(8, 6)
    fresh = nn.Sequential(*stages())
    fresh.load_state_dict(nn.Sequential(*pipe.stages).state_dict())
    assert torch.equal(fresh.eval()(inputs), pipe.predict(inputs))
    for stage, stash in zip(pipe.stages, pipe.stashes, strict=True):
        state = stage.state_dict()
        assert all(torch.equal(state[name], w) for name, w in stash.weights().items())


def test_the_predictions_differ_and_stay_where_forwards_use_them() -> None:
    module, stash, _ = stepped_ring()
    assert not same(module.state_dict(), dict(module.named_parameters()))
    assert same(dict(module.named_parameters()), stash.parameters(stash.newest))
    assert same(module[0].state_dict(), {n: stash.weights()[f"0.{n}"] for n in ("weight", "bias")})
    around = nn.ModuleDict({"inner": module})
    assert same(around.state_dict(), {f"inner.{n}": w for n, w in stash.weights().items()})
    kept = module.state_dict(keep_vars=True)
    assert all(kept[name] is w for name, w in stash.weights().items())
    assert not module.state_dict()["0.weight"].requires_grad


def test_inside_a_block_it_is_the_version_of_the_block() -> None:
    module, stash, _ = stepped_ring()
    with stash.use(stash.oldest):
        assert same(module.state_dict(), stash.parameters(stash.oldest))
    with stash.use_stepped():
        assert same(module.state_dict(), stash.weights())


def test_a_ring_without_predictions_shows_its_newest_weights() -> None:
    pipe = trained("pipemare")
    for stage, stash in zip(pipe.stages, pipe.stashes, strict=True):
        state = stage.state_dict()
        assert all(torch.equal(state[name], w) for name, w in stash.parameters(stash.newest).items())


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_stepped_from(assign: bool) -> None:
    module, stash, optimizer = stepped_ring()
    saved = {name: torch.full_like(w, 0.25) for name, w in module.state_dict().items()}
    module.load_state_dict(saved, assign=assign)
    assert same(module.state_dict(), saved)
    assert same(dict(module.named_parameters()), saved)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(module, optimizer)
    assert same(module.state_dict(), saved)
    assert same(stash.parameters(stash.newest), saved)


def test_what_is_not_loaded_stays() -> None:
    module, _, _ = stepped_ring()
    before = {name: w.clone() for name, w in module.state_dict().items()}
    predicted = {name: p.detach().clone() for name, p in module.named_parameters()}
    module.load_state_dict({"0.bias": torch.zeros(4)}, strict=False)
    assert same(module.state_dict(), {**before, "0.bias": torch.zeros(4)})
    assert same(dict(module.named_parameters()), {**predicted, "0.bias": torch.zeros(4)})
    module[2].load_state_dict({"weight": torch.ones(2, 4), "bias": torch.ones(2)})
    assert same(module[2].state_dict(), {"weight": torch.ones(2, 4), "bias": torch.ones(2)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict({"0.weight": torch.zeros(1)}, strict=False)
    assert torch.equal(module.state_dict()["0.weight"], before["0.weight"])


def test_tied_weights_load_by_assignment() -> None:
    pipe = trained("xpipe")
    saved = {name: torch.zeros_like(w) for name, w in pipe.stages[0].state_dict().items()}
    pipe.stages[0].load_state_dict(saved, assign=True)
    assert same(pipe.stages[0].state_dict(), saved)


def test_without_its_ring_the_module_keeps_the_stepped_weights() -> None:
    module, stash, optimizer = stepped_ring()
    module[2].bias.requires_grad_(False)
    wanted = {name: w.detach().clone() for name, w in stash.weights().items()}
    gone = weakref.ref(stash)
    del stash, optimizer
    gc.collect()
    assert gone() is None
    assert same(dict(module.named_parameters()), wanted)
    assert same(module.state_dict(), wanted)
    assert [p.requires_grad for p in module.parameters()] == [True, True, True, False]


def test_copies_and_pickles_stand_alone() -> None:
    module, _, _ = stepped_ring()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert same(other.state_dict(), dict(module.named_parameters()))
        other.load_state_dict({name: torch.zeros_like(w) for name, w in other.state_dict().items()})
        assert same(other.state_dict(), dict(other.named_parameters()))
    assert module.state_dict()["0.weight"].any()
