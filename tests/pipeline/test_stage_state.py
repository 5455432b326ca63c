"""Checkpoints of a pipeline: the terms that must agree, all-or-nothing loading, and the earlier forms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy import microbatch, model

from nesterov_pp.pipeline import VirtualPipeline
from nesterov_pp.pipeline.stage_state import as_saved_now

OPTIONS: dict[str, Any] = {"method": "nesterov", "lr": 1e-2, "seed": 3, "flush_every": 7, "microbatches_per_update": 2}


def trained(microbatches: int = 8, stages: list[nn.Module] | None = None, **options: Any) -> VirtualPipeline:
    pipe = VirtualPipeline(stages or model(3, 0.1, torch.float32), F.cross_entropy, **{**OPTIONS, **options})
    for m in range(microbatches):
        pipe.step(*microbatch(m))
    return pipe


def flat(state: Any) -> list[Any]:
    """Return the leaves of a nested state, with tensors as lists of numbers."""
    if isinstance(state, dict):
        return [leaf for key in state for leaf in [key, *flat(state[key])]]
    if isinstance(state, list | tuple):
        return [leaf for part in state for leaf in flat(part)]
    return [state.tolist() if isinstance(state, torch.Tensor) else state]


def goes_on_as(pipe: VirtualPipeline, wanted: VirtualPipeline) -> bool:
    begin = wanted.microbatches
    return all(torch.equal(*(p.step(*microbatch(m)) for p in (pipe, wanted))) for m in range(begin, begin + 12))


def refused(pipe: VirtualPipeline, state: Any) -> str:
    """Return the sentence with which a state is refused; check that nothing changed."""
    before = copy.deepcopy(flat(pipe.state_dict()))
    with pytest.raises(ValueError) as error:
        pipe.load_state_dict(state)
    assert flat(pipe.state_dict()) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_unfinished_update_cannot_be_saved() -> None:
    with pytest.raises(
        ValueError, match=r"1 microbatch\(es\) of an unfinished update are waiting; save after a multiple of 2"
    ):
        trained(3).state_dict()


@pytest.mark.parametrize(
    ("name", "other", "sentence"),
    [
        ("method", "pipedream", "the saved pipeline has method 'nesterov', this one 'pipedream'"),
        ("microbatches_per_update", 4, "the saved pipeline has microbatches_per_update 2, this one 4"),
        ("flush_every", None, "the saved pipeline has flush_every 7, this one None"),
        ("seed", 4, "the saved pipeline has seed 3, this one 4"),
        ("delays", [2, 2, 0], "the saved pipeline has delays [1, 0, 0], this one [2, 2, 0]"),
    ],
)
def test_what_must_agree(name: str, other: Any, sentence: str) -> None:
    assert refused(trained(**{name: other}), trained().state_dict()) == sentence


def test_a_waiting_pipeline_of_another_number_of_microbatches_an_update_is_refused() -> None:
    saved = trained(method="gpipe", microbatches_per_update=4).state_dict()
    sentence = refused(trained(method="gpipe", microbatches_per_update=2), saved)
    assert sentence == "the saved pipeline has microbatches_per_update 4, this one 2"


def broken(change: str) -> Any:
    saved = copy.deepcopy(trained(10).state_dict())
    last = saved["stages"][2]
    if change == "stage":
        del saved["stages"][1]
    elif change == "optimizer":
        last["optimizer"]["param_groups"][0].pop("betas")
    elif change == "no optimizer":
        last["optimizer"] = None
    elif change == "ring":
        last["stash"]["weights"][-1]["0.up.weight"] = torch.zeros(1)
    elif change == "entry":
        saved["stages"][2] = {"stash": last["stash"]}
    else:
        return {"state": {}, "param_groups": []}
    return saved


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("stage", "the saved pipeline has no stage 1; it has 0, 2"),
        ("optimizer", "the saved parameter group 0 has no 'betas'; it was saved by another optimizer"),
        ("no optimizer", "only one of the saved stage and this stage has trainable parameters"),
        ("ring", "0.up.weight was saved as torch.float32 of shape (1,), but is torch.float32 of shape (12, 12) here"),
        ("entry", "a saved stage must be a dict with buffers, optimizer, stash"),
        ("all", "load_state_dict takes what a pipeline's state_dict() returned"),
    ],
)
def test_all_stages_or_none(change: str, sentence: str) -> None:
    pipe = trained()
    assert refused(pipe, broken(change)) == sentence
    assert goes_on_as(pipe, trained())


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_buffers_that_do_not_fit_are_refused(change: str) -> None:
    def stages() -> list[nn.Module]:
        first, *others = model(3, dtype=torch.float32)
        return [nn.Sequential(first, nn.BatchNorm1d(12)), *others]

    pipe, saved = trained(stages=stages()), copy.deepcopy(trained(10, stages()).state_dict())
    buffers = saved["stages"][0]["buffers"]
    mean = buffers.pop("1.running_mean")
    if change == "shape":
        buffers["1.running_mean"] = mean[:3]
        wanted = "the buffer 1.running_mean was saved with shape (3,), but has (12,) here"
    else:
        wanted = "the saved stage and this stage have different buffers: 1.running_mean"
    assert refused(pipe, saved) == wanted


def as_before(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint of all stages in its earlier form."""
    stages = saved["stages"].values()
    return {
        "method": saved["terms"]["method"],
        "delays": saved["terms"]["delays"],
        "microbatches": saved["microbatches"],
        "updates": saved["updates"],
        "stashes": [{"beside" if k == "shadow" else k: v for k, v in stage["stash"].items()} for stage in stages],
        "optimizers": [stage["optimizer"] for stage in stages],
        "forecasts": [stage["forecast"] for stage in stages if "forecast" in stage],
        "buffers": [stage["buffers"] for stage in stages],
    }


@pytest.mark.parametrize("method", ["nesterov", "poly-forecast", "lwp"])
def test_an_earlier_form_of_all_stages_loads(method: str) -> None:
    pipe, resumed = trained(16, method=method), trained(0, method=method)
    resumed.load_state_dict(as_before(copy.deepcopy(pipe.state_dict())))
    assert goes_on_as(resumed, pipe)
    pipe = trained(0, method="pipedream")
    assert "has method" in refused(pipe, as_before(trained(method=method).state_dict()))


def test_an_earlier_form_of_one_stage_is_that_of_today() -> None:
    saved = trained(method="nesterov-no-stash").state_dict()
    saved["stages"] = {1: {**saved["stages"][1], "kept": {3: {}}}}
    before = {**saved["terms"], **saved["stages"][1], "stage": 1, "microbatches": saved["microbatches"]}
    assert as_saved_now(before) == saved


def test_stages_of_several_files_are_those_of_one_pipeline() -> None:
    pipe = trained(10)
    saved = pipe.state_dict()
    files = [{**saved, "stages": {i: stage}} for i, stage in saved["stages"].items()]
    together = {**files[1], "stages": {i: stage for file in files for i, stage in file["stages"].items()}}
    resumed = trained(4)
    resumed.load_state_dict(copy.deepcopy(together))
    assert goes_on_as(resumed, pipe)
