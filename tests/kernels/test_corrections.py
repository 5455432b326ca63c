"""Corrections and predictions inside the pass: backends against the reference, instruction sets against each other."""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS
from corrected import CASES, RULES, SIZES, VERSIONS, run
from tolerances import MANY_STEPS, ULPS, ulps_apart
from torch import nn

import nesterov_pp as npp
from nesterov_pp.kernels import extension
from nesterov_pp.optim import DelayCompensation, Discrepancy, FusedOptimizer, GapAware, Prediction

C, REASON = extension.load()
needs_extension = pytest.mark.skipif(C is None, reason=str(REASON))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backends_equal_the_reference(dtype, backend, rule, case):
    ours, optimizer = run(rule, CASES[case], backend, dtype)
    assert optimizer.backend == backend
    expected, _ = run(rule, CASES[case], "reference", dtype)
    torch.testing.assert_close(ours, expected, **MANY_STEPS[dtype])
    plain, _ = run(rule, {}, backend, dtype)
    shadow, newest, last = VERSIONS * len(SIZES), (VERSIONS - 1) * len(SIZES), len(SIZES) - 1
    if case == "discrepancy":  # leaves the ring unchanged and writes other weights to the shadow
        assert not torch.equal(ours[shadow + last], ours[newest + last])
    else:
        assert not torch.equal(ours[newest + last], plain[newest + last])


@needs_extension
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("state_dtype", [None, torch.float32])
def test_bfloat16_is_rounded_as_the_reference_rounds(case, state_dtype):
    options = {**CASES[case], "state_dtype": state_dtype}
    ours, _ = run("AdamW", options, "cpu", torch.bfloat16, steps=1)
    expected, _ = run("AdamW", options, "reference", torch.bfloat16, steps=1)
    low = [(a, b) for a, b in zip(ours, expected, strict=True) if a.dtype == torch.bfloat16]
    assert all(ulps_apart(a, b) <= ULPS[torch.bfloat16] for a, b in low)
    wide = [(a, b) for a, b in zip(ours, expected, strict=True) if a.dtype != torch.bfloat16]
    assert bool(wide) == (state_dtype is not None)
    for a, b in wide:
        torch.testing.assert_close(a, b, **MANY_STEPS[torch.float32])


@needs_extension
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_instruction_set_and_thread_count_gives_the_same_bits(dtype, case):
    results, selected, threads = [], C.isa(), torch.get_num_threads()
    try:
        for isa in C.isas():
            for count in (1, 3):
                C.set_isa(isa)
                torch.set_num_threads(count)
                results.append(run("NAdam", CASES[case], "cpu", dtype, sizes=[*SIZES, 300_000])[0])
    finally:
        C.set_isa(selected)
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("rule", ["NAdam", "AdamW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_correction_of_no_strength_and_a_horizon_of_none_leave_the_bits(dtype, rule, backend):
    plain, _ = run(rule, {}, backend, dtype)
    without, _ = run(rule, {"correction": DelayCompensation(0.0)}, backend, dtype)
    assert all(torch.equal(a, b) for a, b in zip(plain, without, strict=True))
    generator = torch.Generator().manual_seed(0)
    rings = []
    for prediction in (None, Prediction("displacement"), Prediction("momentum")):
        module = nn.ParameterList([torch.ones(1000, dtype=dtype)])
        stash = npp.WeightStash(module, VERSIONS, shadow=prediction.shadow if prediction else None)
        options = {} if prediction is None else {"prediction": prediction}
        optimizer = RULES[rule](module.parameters(), stash=stash, backend=backend, **options)
        for group in optimizer.param_groups:
            if prediction is not None:
                group["horizon"] = 0.0
        generator.manual_seed(0)
        for _ in range(5):
            (leaf,) = stash.parameters(stash.newest).values()
            leaf.grad = torch.randn(1000, generator=generator, dtype=dtype)
            optimizer.step()
        rings.append(leaf.detach().clone())
    assert torch.equal(rings[0], rings[1])
    assert torch.equal(rings[0], rings[2])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"correction": GapAware()}, "needs the older weights of a WeightStash; pass stash="),
        ({"prediction": Prediction()}, r"needs stash=WeightStash\(..., shadow='stepped'\)"),
        ({"stash": (2, "linearised"), "prediction": Prediction()}, "shadow='stepped'"),
        ({"stash": (2, "stepped")}, "needs an optimizer with a prediction"),
        (
            {"stash": (2, "linearised"), "prediction": Discrepancy(), "correction": GapAware()},
            "cannot be combined with GapAware",
        ),
    ],
)
def test_options_that_do_not_go_together(options, sentence):
    module = nn.Linear(2, 2)
    if "stash" in options:
        versions, shadow = options["stash"]
        options = {**options, "stash": npp.WeightStash(module, versions, shadow=shadow)}
    with pytest.raises(ValueError, match=sentence):
        npp.AdamW(module.parameters(), **options)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: DelayCompensation(-1.0), "strength must be from 0"),
        (lambda: GapAware(decay=1.0), "decay must be from 0 to below 1"),
        (lambda: Prediction("magic"), "by must be 'displacement' or 'momentum'"),
        (lambda: Prediction(damping=0.0), "damping must be above 0"),
        (lambda: Discrepancy(decay=0.0), "decay must be above 0"),
    ],
)
def test_bad_hyper_parameters(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()


LOW = {
    "masters of bfloat16": (torch.bfloat16, {"master_weights": True}),
    "masters of float16": (torch.float16, {"master_weights": True, "state_dtype": torch.bfloat16}),
    "float16": (torch.float16, {"state_dtype": torch.float32}),
    "stochastic": (torch.bfloat16, {"stochastic_rounding": True, "seed": 5}),
    "masters, stochastic moments": (
        torch.bfloat16,
        {"master_weights": True, "stochastic_rounding": True, "state_dtype": torch.bfloat16},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", ["AdamW", "Lion"])
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"])
def test_low_precision_is_that_of_the_reference(backend, low, rule, case):
    dtype, options = LOW[low]
    steps = 3 if "master_weights" in options else 1  # else the next step amplifies one different rounding
    ours, optimizer = run(rule, {**CASES[case], **options}, backend, dtype, steps=steps)
    assert optimizer.backend == backend
    expected, reference = run(rule, {**CASES[case], **options}, "reference", dtype, steps=steps)
    for s, t in zip(optimizer.state.values(), reference.state.values(), strict=True):
        if "master_weight" in s:
            torch.testing.assert_close(s["master_weight"], t["master_weight"], **MANY_STEPS[torch.float32])
    for a, b in zip(ours, expected, strict=True):
        if a.dtype == torch.float32:
            torch.testing.assert_close(a, b, **MANY_STEPS[torch.float32])
        else:
            assert ulps_apart(a, b) <= ULPS[a.dtype]
            assert (a != b).sum() <= 1 + 0.001 * a.numel()  # different random bits would change half of the elements


@pytest.mark.parametrize("case", ["delay compensation", "adaptive delay compensation", "gap"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_masters_without_a_delay_are_no_distance_from_their_rounded_copies(backend, case):
    """A gradient that is not late is not corrected, although its weights are the rounded masters."""

    def steps(options: dict[str, object]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = nn.Linear(40, 30).bfloat16()
        stash = npp.WeightStash(module, 2)
        optimizer = npp.AdamW(module.parameters(), stash=stash, master_weights=True, backend=backend, **options)
        for _ in range(5):
            for p in stash.parameters(stash.newest).values():
                p.grad = torch.randn_like(p)
            optimizer.step(version=stash.newest)
        return [s["master_weight"] for s in optimizer.state.values()]

    for a, b in zip(steps(CASES[case]), steps({}), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_masters_beside_predictions(backend):
    """The stepped weights are kept twice, in float32 and rounded in the shadow; the ring holds the predictions."""
    torch.manual_seed(0)
    module = nn.Linear(40, 30).bfloat16()
    stash = npp.WeightStash(module, 2, shadow="stepped")
    optimizer = npp.AdamW(
        module.parameters(), lr=1e-2, stash=stash, master_weights=True, prediction=Prediction(), backend=backend
    )
    for group in optimizer.param_groups:
        group["horizon"] = 3.0
    for _ in range(3):
        before = {p: s["master_weight"].clone() for p, s in optimizer.state.items() if "master_weight" in s}
        for p in stash.parameters(stash.newest).values():
            p.grad = torch.randn_like(p)
        optimizer.step(version=stash.newest)
    predicted, stepped = stash.parameters(stash.newest), stash.weights()
    for name, (p, s) in zip(stepped, optimizer.state.items(), strict=True):
        master, last = s["master_weight"], before[p]
        assert master.dtype == torch.float32
        assert torch.equal(stepped[name], master.bfloat16())
        assert not torch.equal(stepped[name].float(), master)
        expected = (master.double() + 3.0 * (master.double() - last.double())).bfloat16()
        assert ulps_apart(predicted[name].detach(), expected) <= ULPS[torch.bfloat16]


def test_a_correction_goes_on_after_a_checkpoint():
    def made() -> tuple[npp.WeightStash, FusedOptimizer]:
        torch.manual_seed(0)
        module = nn.Linear(3, 3)
        stash = npp.WeightStash(module, 2, shadow="stepped")
        options = {"correction": GapAware(), "prediction": Prediction("momentum")}
        return stash, npp.AdamW(module.parameters(), stash=stash, **options)

    def steps(stash: npp.WeightStash, optimizer: FusedOptimizer, seeds: range) -> None:
        for seed in seeds:
            torch.manual_seed(seed)
            for p in stash.parameters(stash.oldest).values():
                p.grad = torch.randn(p.shape)
            optimizer.step(version=stash.oldest)

    stash, optimizer = made()
    steps(stash, optimizer, range(10))
    first, second = made(), made()
    steps(*first, range(5))
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    steps(*second, range(5, 10))
    for a, b in zip(stash.weights().values(), second[0].weights().values(), strict=True):
        assert torch.equal(a, b)
    bare = npp.WeightStash(nn.Linear(3, 3), 2)
    with pytest.raises(ValueError, match="outside the ring"):
        bare.load_state_dict(first[0].state_dict())
