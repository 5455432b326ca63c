"""The hyper-parameters of the recipes compared with the paper's tables, and properties of all recipes."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.nn import functional as F
from toy import microbatch, model

from nesterov_pp.methods.rates import discount_by_delay
from nesterov_pp.pipeline import Placement, VirtualPipeline, find_recipe, recipes, register


def test_the_list():
    assert sorted(recipes()) == [
        "basis-rotation",
        "basis-rotation-1st-uni",
        "dana-dc",
        "dana-slim",
        "dana-zero",
        "dc-asgd",
        "fft-forecast",
        "gap-aware",
        "gba",
        "gpipe",
        "gpipe-1",
        "gpipe-1-muon",
        "gpipe-1-nadam",
        "gpipe-1-rotated",
        "gpipe-1-rotated-nadam",
        "gpipe-muon",
        "gpipe-nadam",
        "gpipe-rotated",
        "gpipe-rotated-nadam",
        "lr-second-order",
        "lwp",
        "nesterov",
        "nesterov-horizon",
        "nesterov-no-stash",
        "nesterov-rotated",
        "nesterov-sgd",
        "one-step-ef",
        "one-step-ef-muon",
        "one-step-ef-nadam",
        "paci",
        "pipedream",
        "pipedream-2bw",
        "pipedream-lr",
        "pipedream-rotated",
        "pipemare",
        "poly-forecast",
        "spectrain",
        "staleness-aware",
        "swarm",
        "xpipe",
    ]


def test_momentum_by_stage():
    recipe = find_recipe("nesterov-no-stash")
    betas = [recipe.stage_options(Placement(i, 8, 8 - i))["betas"][0] for i in range(1, 9)]
    assert betas == pytest.approx([0.97875, 0.9675, 0.95625, 0.945, 0.93375, 0.9225, 0.91125, 0.90])


def test_rate_by_delay():
    horizon = 7_000
    start = [discount_by_delay(tau, 0, horizon) for tau in (7, 6, 5, 4, 3, 2, 1, 0)]
    assert start == pytest.approx([1 / 7, 1 / 6, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 1, 1], rel=1e-3)
    for tau in range(8):
        rates = [discount_by_delay(tau, t, horizon) for t in range(0, horizon + 10, 50)]
        assert rates == sorted(rates)
        assert discount_by_delay(tau, horizon - 1, horizon) == 1.0
        assert discount_by_delay(tau, 10 * horizon, horizon) == 1.0


def test_a_name_with_hyper_parameters():
    recipe = find_recipe("nesterov:beta1=0.9:weight_decay=0")
    assert recipe.name == "nesterov:beta1=0.9:weight_decay=0"
    assert recipe.options["betas"] == (0.9, find_recipe("nesterov").options["betas"][1])
    assert recipe.options["weight_decay"] == 0
    assert find_recipe("pipedream-lr:correction_updates=7").correction_updates == 7


@pytest.mark.parametrize("method", ["nesterov-rotated", "gpipe-1", "pipedream-2bw", "gba"])
def test_every_method_takes_microbatches_per_update(method: str):
    recipe = find_recipe(f"{method}:microbatches_per_update=3")
    assert [recipe.accumulation(stages) for stages in (1, 8)] == [3, 3]
    pipe = VirtualPipeline(model(4), F.cross_entropy, f"{method}:microbatches_per_update=3", 0.01)
    assert pipe.delays == find_recipe(method).delays_of(4, 3).expected
    for m in range(6):
        pipe.step(*microbatch(m))
    assert pipe.updates == 2


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nester:beta1=0.9", "unknown method 'nester'; choose one of nesterov"),
        ("nesterov:beta3=0.9", "method 'nesterov' has no hyper-parameter 'beta3'; it has "),
        ("nesterov:beta1", "after a method's name comes :hyper-parameter=value, not :beta1"),
        ("gpipe:microbatches_per_update=0", "microbatches_per_update must be a whole number of at least 1, not 0"),
        ("gpipe:microbatches_per_update=2.0", "microbatches_per_update must be a whole number of at least 1, not 2.0"),
        ("gpipe:microbatches_per_update=x", "microbatches_per_update must be a whole number of at least 1, not 'x'"),
        ("nesterov:slack=-1", "slack must be a whole number of at least 0, not -1"),
        ("gpipe-1:slack=1", "method 'gpipe-1' waits for its gradients, so it has no slack; omit it"),
        ("one-step-ef:slack=1", "method 'one-step-ef' has delays of its own, to which slack cannot add; omit it"),
        ("nesterov:", "after a method's name comes :hyper-parameter=value, not :"),
    ],
)
def test_bad_names(name: str, sentence: str):
    with pytest.raises(ValueError) as error:
        find_recipe(name)
    assert str(error.value).startswith(sentence)


def test_overrides():
    recipe = find_recipe("nesterov-no-stash").override({"betas": (0.5, 0.9), "correction_updates": 10})
    assert recipe.options["betas"] == (0.5, 0.9)
    assert recipe.stage_options(Placement(1, 8, 7)) == {}
    assert recipe.correction_updates == 10
    assert find_recipe("nesterov-no-stash").correction_updates == 7_000
    with pytest.raises(ValueError, match="has no hyper-parameter 'correction_updates'"):
        find_recipe("nesterov").override({"correction_updates": 10})


def test_names_are_unique():
    with pytest.raises(ValueError, match="registered already"):
        register(find_recipe("nesterov"))


@pytest.mark.parametrize("method", recipes())
def test_the_default_device_does_not_matter(method):
    if "muon" in method and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 counts the steps of its AdamW on the default device")

    def losses(default: contextlib.AbstractContextManager[object]) -> list[float]:
        stages, data = model(3), [microbatch(m) for m in range(12)]
        with default:
            pipe = VirtualPipeline(stages, F.cross_entropy, method, 0.01)
            return [float(pipe.step(*inputs)) for inputs in data]

    assert losses(torch.device("meta")) == losses(contextlib.nullcontext())
