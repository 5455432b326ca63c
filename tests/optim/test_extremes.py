"""Extremes that torch survives: infinite weights, overflowing second moments, betas with which old values cancel."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from backends import BACKENDS
from corrected import CASES, RULES
from tolerances import MANY_STEPS
from torch import Tensor

import nesterov_pp as npp

INF = float("inf")
TOLERANCES = {
    **MANY_STEPS,
    # For these dtypes, torch rounds every intermediate result.
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-12},
    torch.float16: {"rtol": 2**-9, "atol": 2**-12},
}
DTYPES = list(TOLERANCES)
RULE_NAMES = ["NAdam", "AdamW"]
PLAIN: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.0}
ORDINARY = [0.1, -0.2, 0.05, 0.3, 0.1]


@pytest.fixture(autouse=True)
def tensors_of_the_backend() -> None:
    """Tensors are made on the host, where torch's trajectories are computed, and ours are moved from there."""


def on(backend: str) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and backend in ("triton", "cuda") else "cpu")


def trajectory(cls: Any, w: Tensor, grads: list[Tensor], state: dict | None = None, **options: Any) -> list[Tensor]:
    """Return the weights after every step."""
    p = torch.nn.Parameter(w.clone())
    optimizer = cls([p], **options)
    if state is not None:
        optimizer.load_state_dict(deepcopy(state))
    found = []
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        found.append(p.detach().clone())
    return found


def equal_torchs(name: str, backend: str, w: Tensor, grads: list[Tensor], **options: Any) -> list[Tensor]:
    """Check that our weights after every step are torch's, and return them."""
    device, dtype = on(backend), w.dtype
    if dtype == torch.float16:
        options = {"eps": 1e-4} | options  # the default eps is 0 in float16
    # torch keeps the product of mu in a scalar of the default dtype, whatever the parameters are.
    torch.set_default_dtype(torch.float64 if dtype == torch.float64 else torch.float32)
    try:
        theirs = trajectory(getattr(torch.optim, name), w, grads, **options)
        moved = [g.to(device) for g in grads]
        ours = trajectory(getattr(npp, name), w.to(device), moved, backend=backend, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    ours = [t.cpu() for t in ours]
    torch.testing.assert_close(ours, theirs, equal_nan=True, **TOLERANCES[dtype])
    return ours


def decays(name: str) -> dict[str, dict[str, Any]]:
    if name == "AdamW":
        return {"none": {"weight_decay": 0.0}, "decoupled": {"weight_decay": 0.1}}
    return {
        "none": {"weight_decay": 0.0},
        "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        "l2": {"weight_decay": 0.1},
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "decay"), [(n, d) for n in RULE_NAMES for d in decays(n)])
def test_infinite_weights(name, decay, dtype, backend):
    """Infinite weights, as in a mask, with zero and nonzero gradients."""
    w = torch.tensor([INF, -INF, INF, -INF, 1.0, -2.0, 0.0], dtype=dtype).repeat(7)
    grads = [torch.tensor([0.0, 0.0, g, -g, g, 0.0, g], dtype=dtype).repeat(7) for g in ORDINARY]
    ours = equal_torchs(name, backend, w, grads, lr=1e-2, **decays(name)[decay])
    infinite = w.isinf()
    if decay == "l2":
        assert all(t[infinite].isnan().all() for t in ours), "torch's gradient is infinite"
    else:
        assert all(torch.equal(t[infinite], w[infinite]) for t in ours)
    assert all(t[~infinite].isfinite().all() for t in ours)


HUGE = {
    torch.float16: [1e4],
    torch.bfloat16: [1e20, 1e30],
    torch.float32: [1e20, 1e30],
    torch.float64: [1e155, 1e200],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "huge"), [(d, h) for d, values in HUGE.items() for h in values])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("name", RULE_NAMES)
def test_one_huge_gradient(name, after, dtype, huge, backend):
    """torch's second moment overflows, or nearly; then the weight stays where it is, and its neighbours go on."""
    w = torch.tensor([1.0, 1.0, -1.0], dtype=dtype).repeat(11)
    grads = [torch.tensor([g, g, -g], dtype=dtype).repeat(11) for g in ORDINARY]
    grads[after][::3] = huge
    ours = equal_torchs(name, backend, w, grads, **PLAIN)
    assert all(t.isfinite().all() for t in ours)
    assert not torch.equal(ours[-1][1::3], ours[after][1::3])
    if huge == HUGE[dtype][-1]:
        assert all(torch.equal(t[::3], ours[after][::3]) for t in ours[after:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", ["none", "decoupled"])
@pytest.mark.parametrize("name", RULE_NAMES)
def test_a_huge_gradient_and_float16_beside_float32_moments(name, decay, backend):
    """float32 moments do not overflow: the result is that of float32."""
    options = {"lr": 1e-2, **decays(name)[decay]}
    w, grads = torch.ones(33), [torch.full((33,), g) for g in (1e4, *ORDINARY)]
    expected = trajectory(getattr(torch.optim, name), w, [g.half().float() for g in grads], **options)
    device = on(backend)
    low = [g.half().to(device) for g in grads]
    got = trajectory(
        getattr(npp, name), w.half().to(device), low, state_dtype=torch.float32, backend=backend, **options
    )
    for t, e in zip(got, expected, strict=True):
        torch.testing.assert_close(t.cpu().float(), e, rtol=0.0, atol=len(grads) * 2**-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.3, 0.2), (0.9, 0.0), (0.0, 0.999), (0.5, 0.5), (0.9, 0.999)])
@pytest.mark.parametrize("name", RULE_NAMES)
def test_small_betas(name, betas, dtype, backend):
    """A gradient of 10,000 is forgotten as fast as in torch."""
    w = torch.tensor([1.0, -1.0], dtype=dtype).repeat(9)
    grads = [torch.full((18,), g, dtype=dtype) for g in (1e4, 0.1, 0.1, -0.2)]
    options = {**PLAIN, "betas": betas}
    if dtype == torch.float16:
        theirs = trajectory(getattr(torch.optim, name), w, grads, **options)
        device = on(backend)
        ours = trajectory(getattr(npp, name), w.to(device), [g.to(device) for g in grads], backend=backend, **options)
        # Our step rounds once, so its quotient need not overflow where torch's does.
        assert [t.isfinite().all() for t in ours] == [t.isfinite().all() for t in theirs]
        torch.testing.assert_close([t.cpu() for t in ours][:1], theirs[:1], equal_nan=True, **TOLERANCES[dtype])
    else:
        equal_torchs(name, backend, w, grads, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RULE_NAMES)
def test_an_infinite_second_moment_is_loaded(name, dtype, backend):
    w = torch.tensor([1.0, -1.0], dtype=dtype).repeat(9)
    grads = [torch.full((18,), g, dtype=dtype) for g in ORDINARY]
    theirs = torch.nn.Parameter(w.clone())
    optimizer = getattr(torch.optim, name)([theirs], **PLAIN)
    theirs.grad = grads[0].clone()
    optimizer.step()
    optimizer.state[theirs]["exp_avg_sq"][::2] = INF
    state = optimizer.state_dict()
    ours = equal_torchs(name, backend, w, grads, state=state, **PLAIN)
    assert all(torch.equal(t[::2], w[::2]) for t in ours)
    assert not torch.equal(ours[-1][1::2], w[1::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_amsgrad(dtype):
    w = torch.tensor([INF, 1.0, -1.0], dtype=dtype).repeat(9)
    grads = [torch.tensor([0.0, g, g], dtype=dtype).repeat(9) for g in ORDINARY]
    grads[1][2::3] = HUGE[dtype][-1]
    equal_torchs("AdamW", "reference", w, grads, **PLAIN, amsgrad=True)


def late_run(
    rule: str, options: dict[str, Any], backend: str, dtype: torch.dtype, infinite: Tensor, huge: float = 0.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Take late steps in a ring of 3; return all versions and the shadow after every step, and the final state."""
    generator, device = torch.Generator().manual_seed(0), on(backend)
    w = torch.randn(37, generator=generator, dtype=torch.float64)
    w[infinite[::2]], w[infinite[1::2]] = INF, -INF
    module = torch.nn.ParameterList([w.to(device, dtype)])
    prediction = options.get("prediction")
    stash = npp.WeightStash(module, 3, shadow=None if prediction is None else prediction.shadow)
    optimizer = RULES[rule](module.parameters(), stash=stash, backend=backend, **options)
    seen = []
    for t in range(6):
        late = max(0, stash.newest - 2)
        grad = torch.randn(37, generator=generator, dtype=torch.float64)
        grad[infinite[::3]] = 0.0
        if t == 0 and huge:
            grad[3] = huge
        next(iter(stash.parameters(late).values())).grad = grad.to(device, dtype)
        optimizer.step(version=late)
        seen += [p.detach().cpu() for v in range(stash.oldest, stash.newest + 1) for p in stash.parameters(v).values()]
        seen += [t.cpu() for t in stash.state_dict().get("shadow", {}).values()]
    state = [t.cpu() for s in optimizer.state.values() for n, t in s.items() if n.startswith("exp_avg")]
    return [t.clone() for t in seen], state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ["ring", *CASES])
@pytest.mark.parametrize("rule", RULES)
def test_infinite_weights_in_a_ring(rule, case, dtype, backend):
    """Infinite weights stay unchanged in every version, including predicted ones, and nothing else differs."""
    infinite = torch.tensor([0, 5, 6, 17, 33, 36])
    options = CASES.get(case, {})
    seen, state = late_run(rule, options, backend, dtype, infinite)
    expected, ordinary_state = late_run(rule, options, backend, dtype, infinite[:0])
    others = torch.ones(37, dtype=torch.bool)
    others[infinite] = False
    for t, e in zip(seen, expected, strict=True):
        assert (t[infinite[::2]] == INF).all()
        assert (t[infinite[1::2]] == -INF).all()
        assert torch.equal(t[others], e[others])
    for t, e in zip(state, ordinary_state, strict=True):
        assert t.isfinite().all()
        assert torch.equal(t[others], e[others])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ["ring", *CASES])
@pytest.mark.parametrize("rule", ["NAdam", "AdamW"])
def test_a_huge_gradient_in_a_ring(rule, case, dtype, backend):
    seen, state = late_run(
        rule, CASES.get(case, {}), backend, dtype, torch.tensor([], dtype=torch.long), HUGE[dtype][-1]
    )
    assert all(t.isfinite().all() for t in seen)
    assert not any(t.isnan().any() for t in state)
