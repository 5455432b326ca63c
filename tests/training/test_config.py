"""Settings: ranges, contradictions, the learning rate, and which of them may differ when a run resumes."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from nesterov_pp.pipeline import recipes
from nesterov_pp.training.config import LATER, Config, UserError, derived_seed, recorded_settings, settle


def test_the_defaults_are_usable_with_every_method() -> None:
    for method in recipes():
        replace(Config(), method=method).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": 9}, "8 layers cannot fill 9 stages"),
        ({"width": 66}, "--width must be a multiple of --heads"),
        ({"method": "gpipe", "microbatches": 2001}, "must be a multiple of 4, not 2001"),
        ({"method": "nesterov-no-stash", "autocast": "bfloat16"}, "use a method with a stash, or turn autocast off"),
        ({"method": "pipemare", "recompute": True}, "keeps activations of older weights, which cannot be recomputed"),
        (
            {"master_weights": True},
            "--master-weights are float32 copies of bfloat16 weights; add --weights-dtype bfloat16",
        ),
        ({"stochastic_rounding": True}, "--stochastic-rounding has nothing to round"),
        (
            {"stochastic_rounding": True, "weights_dtype": "bfloat16", "master_weights": True},
            "--stochastic-rounding has nothing to round",
        ),
        ({"autocast": "bfloat16", "weights_dtype": "bfloat16"}, "--autocast is for float32 weights; omit it, or"),
        (
            {"method": "gpipe-muon", "weights_dtype": "bfloat16", "master_weights": True},
            "has no master_weights, because",
        ),
        ({"method": "nesterov-rotated", "state_dtype": "bfloat16"}, "has no state_dtype, because RotatedNAdam"),
        ({"method": "basis-rotation", "weights_dtype": "bfloat16"}, "steps float32 and float64 weights only"),
        ({"method": "gpipe-muon", "no_decay": True}, "takes no param_groups; its rule groups the parameters itself"),
        ({"method": "nesterov-sgd", "betas": "0.9,0.99"}, "has no hyper-parameter 'betas'; it has .*momentum"),
        ({"method": "nesterov:beta1=0.9", "betas": "0.9,0.99"}, "--betas is given twice: it is also in --method nest"),
        ({"method": "gpipe", "slack": 2}, "method 'gpipe' waits for its gradients, so it has no slack; omit it"),
        ({"method": "pipedream-2bw", "slack": 2}, "has delays of its own, to which slack cannot add; omit it"),
        ({"method": "nesterov:slack=1", "slack": 2}, "--slack is given twice: it is also in --method nesterov:slack=1"),
        (
            {"method": "nesterov-no-stash", "stash": "bfloat16"},
            "keeps no older versions of the weights, so none can be",
        ),
        ({"method": "adam"}, "unknown method 'adam'; choose one of nesterov, "),
    ],
)
def test_contradictions_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(**changes).check()  # type: ignore[arg-type]


def test_given_settings_of_the_optimizer_reach_the_recipe() -> None:
    settings = {"weight_decay": 0.0, "betas": "0.8,0.9", "state_dtype": "bfloat16", "stochastic_rounding": True}
    options = Config(method="nesterov-no-stash", **settings).own_recipe.options
    assert {name: options[name] for name in settings} == {
        "weight_decay": 0.0,
        "betas": (0.8, 0.9),
        "state_dtype": torch.bfloat16,
        "stochastic_rounding": True,
    }


def test_small_formats_reach_the_recipe() -> None:
    settings = {"weights_dtype": "bfloat16", "master_weights": "24bit", "state_dtype": "8bit"}
    config = Config(method="nesterov", **settings)
    config.check_optimizer()
    assert config.own_recipe.options["state_dtype"] == "8bit"
    assert config.own_recipe.options["master_weights"] == "24bit"
    assert config.flags().count("24bit") == 1
    assert parse("master_weights", "24bit") == "24bit"
    assert parse("master_weights", "yes") is True
    with pytest.raises(ValueError, match="needs yes, no or 24bit, not '16bit'"):
        parse("master_weights", "16bit")


def parse(name: str, text: str) -> object:
    (setting,) = (f for f in fields(Config) if f.name == name)
    return setting.metadata["parse"](text)


def test_texts_of_settings() -> None:
    assert parse("betas", "0.9, 0.999") == "0.9,0.999"
    assert parse("weight_decay", "0") == 0.0


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("betas", "0.9", "needs two numbers separated by a comma, such as 0.9,0.999, not '0.9'"),
        ("betas", "1,0.9", "needs a number from 0 to below 1, not '1'"),
        ("weight_decay", "-1", "needs a number of at least 0, not '-1'"),
        ("stash", "8bit", "needs one of full, bfloat16, 8bit-differences, not '8bit'"),
        ("weights_dtype", "float16", "needs one of float32, bfloat16, not 'float16'"),
    ],
)
def test_texts_that_are_no_settings(name: str, text: str, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(name, text)
    assert str(error.value) == sentence


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    config = Config(lr=1.0, warmup=10, microbatches=110)
    rates = [config.learning_rate(m) for m in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[109] == pytest.approx(0.1, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(("warmup", "microbatches"), [(0, 1), (0, 5), (5, 5), (10, 5)])
def test_short_runs_have_a_learning_rate_too(warmup: int, microbatches: int) -> None:
    config = Config(lr=1.0, warmup=warmup, microbatches=microbatches)
    assert all(0.0 < config.learning_rate(m) <= 1.0 for m in range(microbatches))


def test_the_learning_rate_counts_data_so_it_is_the_same_for_every_method() -> None:
    rates = {m: [Config(method=m).learning_rate(k) for k in range(0, 2000, 100)] for m in recipes()}
    assert all(r == rates["nesterov"] for r in rates.values())


def test_eq_13_takes_a_seventh_of_the_run_as_the_paper_has_it() -> None:
    assert Config(method="nesterov-no-stash", microbatches=50_000).overrides() == {"correction_updates": 7_000}
    assert Config(method="pipedream-lr", microbatches=1).overrides() == {"correction_updates": 1}
    assert Config(method="nesterov").overrides() == {}


def test_what_is_not_given_is_as_the_run_began() -> None:
    recorded = asdict(Config(lr=0.5, data="/there"))
    assert settle({}, recorded) == Config(lr=0.5, data="/there")
    assert settle({"lr": 0.5, "checkpoint_every": 7}, recorded) == Config(lr=0.5, data="/there", checkpoint_every=7)


def test_another_setting_is_refused() -> None:
    recorded = asdict(Config())
    with pytest.raises(UserError, match=r"this run has --lr 0\.001, not 0\.5"):
        settle({"lr": 0.5}, recorded)
    with pytest.raises(UserError, match="this run has --flush-every unset, not 5"):
        settle({"flush_every": 5}, recorded)


def test_runs_from_before_a_setting_have_its_default() -> None:
    before = {name: value for name, value in asdict(Config(lr=0.5)).items() if name not in LATER}
    recorded = recorded_settings({"config": before}, Path("config.json"))
    assert settle({}, recorded) == Config(lr=0.5)
    with pytest.raises(UserError, match="this run has --weights-dtype float32, not bfloat16"):
        settle({"weights_dtype": "bfloat16"}, recorded)


def test_settings_of_this_version_are_taken_as_they_are() -> None:
    settings = asdict(Config(lr=1e-7, recompute=True, flush_every=3, seed=2**64 - 1, autocast="bfloat16"))
    assert recorded_settings({"config": json.loads(json.dumps(settings))}, Path("config.json")) == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "config.json is damaged"),
        ([1], "config.json is damaged"),
        ({**asdict(Config()), "new_setting": 1}, r"another version of nesterov_pp \(9\.9\): .* has --new-setting;"),
        ({k: v for k, v in asdict(Config()).items() if k != "lr"}, r"another version .* has --lr; use that version"),
        ({**asdict(Config()), "lr": "fast"}, "'fast' for --lr, which is not possible"),
        ({**asdict(Config()), "lr": None}, "None for --lr, which is not possible"),
        ({**asdict(Config()), "stages": 2.5}, r"2\.5 for --stages"),
        ({**asdict(Config()), "stages": True}, "True for --stages"),
        ({**asdict(Config()), "autocast": "float8"}, "'float8' for --autocast"),
    ],
)
def test_settings_of_another_version_are_refused(settings: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recorded_settings({"nesterov_pp": "9.9", "config": settings}, Path("config.json"))


def test_derived_seeds_are_stable_and_unrelated() -> None:
    seeds = {derived_seed(name, a, b) for name in ("batch", "layer") for a in range(20) for b in range(20)}
    assert len(seeds) == 800
    assert all(0 <= s < 2**63 for s in seeds)
    assert derived_seed("batch", 1, 12) != derived_seed("batch", 11, 2)
    assert derived_seed("batch", 0, 0) == derived_seed("batch", 0, 0)
