"""The optimizers on the device backends compared with the cpu backend: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

import nesterov_pp as npp
from tests.device.devices import BACKENDS, DEVICE, GPU, SIZES, needs, skip_without_any, values

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
OF_GROUPS = [0, 1, 31, 32, 33, 1160, 5120]  # ends within a group, at one, within a block and a part
EXACT = {"rtol": 0.0, "atol": 0.0}
ROUNDED = {"rtol": 1e-6, "atol": 1e-6}  # for sums that are taken in another order

skip_without_any()


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    needs(request.param)
    return request.param


def trained(kind, backend: str, dtype=F32, *, sizes=SIZES, steps: int = 3, missing=(), view=None, **options):
    """Return parameters and optimizer after some steps; ``view`` gives plain tensors another layout."""
    device = "cpu" if backend == "cpu" else DEVICE
    view = view or (lambda t: t)
    ps = [nn.Parameter(view(w.to(device))) for w in values(dtype, sizes)]
    half = len(ps) // 2
    groups = [{"params": ps[:half]}, {"params": ps[half:], "lr": 3e-3, "weight_decay": 0.1}]
    optimizer = kind(groups, lr=1e-2, backend=backend, **options)
    assert optimizer.backend == backend
    for step in range(steps):
        for i, (p, g) in enumerate(zip(ps, values(dtype, sizes, seed=step + 1), strict=True)):
            p.grad = None if (i, step) in missing else view(g.to(device))
        optimizer.step()
    return ps, optimizer


def assert_alike(kind, backend: str, *arguments, close=EXACT, **options) -> None:
    ours, optimizer = trained(kind, backend, *arguments, **options)
    theirs, judge = trained(kind, "cpu", *arguments, **options)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a.detach().cpu(), b.detach(), **close, msg=lambda m, i=i: f"parameter {i}: {m}")
        for name, value in judge.state[b].items():
            found = optimizer.state[a][name]
            assert found.dtype == value.dtype
            torch.testing.assert_close(found.cpu(), value, **close, msg=lambda m, n=name, i=i: f"{n} of {i}: {m}")


@pytest.mark.parametrize("kind", [npp.NAdam, npp.AdamW, npp.NAG, npp.Lion])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_every_rule_and_dtype(kind, dtype, backend):
    assert_alike(kind, backend, dtype)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (F32, {"state_dtype": BF16}),
        (BF16, {"state_dtype": F32}),
        (F16, {"state_dtype": F32}),
        (BF16, {"master_weights": True}),
        (F16, {"master_weights": True}),
        (BF16, {"master_weights": True, "state_dtype": BF16}),
        (BF16, {"stochastic_rounding": True, "seed": (1 << 63) + 5}),
        (BF16, {"stochastic_rounding": True, "seed": 3, "state_dtype": F32}),
        (F32, {"stochastic_rounding": True, "seed": 3, "state_dtype": BF16}),
        (F32, {"maximize": True}),
        (F32, {"decoupled_weight_decay": True}),
    ],
    ids=str,
)
def test_every_option(dtype, options, backend):
    assert_alike(npp.NAdam, backend, dtype, **options)


SMALL_FORMATS = [
    (F32, {"state_dtype": "8bit"}),
    (BF16, {"state_dtype": "8bit"}),
    (F16, {"state_dtype": "8bit"}),
    (BF16, {"state_dtype": "8bit", "stochastic_rounding": True}),
    (BF16, {"state_dtype": "8bit", "master_weights": True}),
    (BF16, {"state_dtype": "8bit", "master_weights": "24bit"}),
    (BF16, {"master_weights": "24bit"}),
    (BF16, {"state_dtype": BF16, "master_weights": "24bit"}),
    (BF16, {"state_dtype": BF16, "master_weights": "24bit", "stochastic_rounding": True}),
]


@pytest.mark.parametrize("kind", [npp.NAdam, npp.AdamW, npp.NAG, npp.Lion])
@pytest.mark.parametrize(("dtype", "options"), SMALL_FORMATS, ids=str)
def test_every_rule_in_small_formats(kind, dtype, options, backend):
    assert_alike(kind, backend, dtype, sizes=OF_GROUPS, seed=(1 << 63) + 5, **options)


BOTH = {"state_dtype": "8bit", "master_weights": "24bit"}


@pytest.mark.parametrize(("dtype", "options"), [(F32, {"state_dtype": "8bit"}), (BF16, BOTH)], ids=str)
def test_every_tail_in_small_formats(dtype, options, backend):
    sizes = list(range(1, 101, 1 if GPU else 13))
    assert_alike(npp.NAdam, backend, dtype, sizes=sizes, steps=2, **options)
    assert_alike(npp.NAdam, backend, dtype, sizes=sizes, steps=2, view=shifted, **options)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"betas": (0.3, 0.99)}, {"maximize": True}], ids=str)
def test_small_formats_over_several_chunks(options, backend):
    assert_alike(npp.NAdam, backend, BF16, sizes=[17_001], steps=2, **BOTH, **options)


def test_small_formats_with_missing_gradients(backend):
    assert_alike(npp.AdamW, backend, BF16, sizes=OF_GROUPS, missing={(2, 0), (5, 1), (6, 2), (4, 0), (4, 1)}, **BOTH)


def test_groups_of_different_formats(backend):
    """A launch takes tensors of the same formats."""
    results = []
    for name in (backend, "cpu"):
        ps = [nn.Parameter(w.to("cpu" if name == "cpu" else DEVICE)) for w in values(F32, OF_GROUPS)]
        groups = [{"params": ps[:5]}, {"params": ps[5:], "state_dtype": "8bit"}]
        optimizer = npp.NAdam(groups, backend=name)
        for step in range(3):
            for p, g in zip(ps, values(F32, OF_GROUPS, seed=step + 1), strict=True):
                p.grad = g.to(p.device)
            optimizer.step()
        results.append([p.detach().cpu() for p in ps])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1e30, 1e-30, 0.0])
@pytest.mark.parametrize("kind", [npp.NAdam, npp.Lion])
def test_groups_with_an_odd_element(kind, odd, backend):
    """Zeros, overflows and numbers below the smallest scale, beside usual groups and in all of a block."""
    results = []
    for name in (backend, "cpu"):
        p = nn.Parameter(torch.linspace(-1, 1, 2048).to("cpu" if name == "cpu" else DEVICE, BF16))
        optimizer = kind([p], backend=name, **BOTH)
        for step in range(3):
            p.grad = values(BF16, [2048], seed=step)[0].to(p.device)
            p.grad[70] = p.grad[1024:] = odd
            optimizer.step()
        results.append([p.detach(), *optimizer.state[p].values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.cpu(), b, **EXACT, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_clipping(dtype, backend):
    ours, optimizer = trained(npp.NAdam, backend, dtype, max_grad_norm=1.0)
    theirs, judge = trained(npp.NAdam, "cpu", dtype, max_grad_norm=1.0)
    assert optimizer.last_grad_norm.item() == pytest.approx(judge.last_grad_norm.item(), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        close = ROUNDED if dtype == F32 else {"rtol": 2**-7, "atol": 2**-7}
        torch.testing.assert_close(a.detach().cpu(), b.detach(), **close)


def test_a_norm_is_the_same_in_every_run(backend):
    norms = {float(trained(npp.NAdam, backend, steps=1, max_grad_norm=1.0)[1].last_grad_norm) for _ in range(3)}
    assert len(norms) == 1


def test_missing_gradients(backend):
    assert_alike(npp.NAdam, backend, missing={(2, 0), (5, 1), (7, 2), (4, 0), (4, 1)})


def strided(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1, 1).repeat(1, 6).reshape(-1, 2, 3).transpose(0, 2)


def shifted(t: torch.Tensor) -> torch.Tensor:
    """Return the values of ``t`` at an address that is not a multiple of 16."""
    return torch.cat([t.new_zeros(1), t])[1:]


@pytest.mark.parametrize("view", [strided, shifted])
@pytest.mark.parametrize(("dtype", "options"), [(F32, {}), (F32, {"state_dtype": "8bit"}), (BF16, BOTH)], ids=str)
def test_layouts_and_addresses(view, dtype, options, backend):
    assert_alike(npp.NAdam, backend, dtype, sizes=[3, 64, 1000], view=view, **options)


def test_gradients_of_another_layout(backend):
    results = []
    for name in (backend, "cpu"):
        device = "cpu" if name == "cpu" else DEVICE
        p = nn.Parameter(torch.arange(24.0, device=device).reshape(4, 6))
        p.grad = torch.linspace(-1, 1, 24, device=device).reshape(6, 4).t()
        npp.NAdam([p], backend=name).step()
        results.append(p.detach().cpu())
    assert torch.equal(*results)


@pytest.mark.parametrize(("dtype", "options"), [(F32, {}), (F32, {"state_dtype": "8bit"}), (BF16, BOTH)], ids=str)
def test_a_ring(dtype, options, backend):
    results = []
    for name in (backend, "cpu"):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(7, 33), nn.LayerNorm(33), nn.Linear(33, 5))
        module.to("cpu" if name == "cpu" else DEVICE, dtype)
        stash = npp.WeightStash(module, versions=3)
        optimizer = npp.NAdam(module.parameters(), backend=name, stash=stash, max_grad_norm=100.0, **options)
        for step in range(7):
            version = max(stash.oldest, stash.newest - step % 2)
            for i, leaf in enumerate(stash.parameters(version).values()):
                grad = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(step * 10 + i))
                leaf.grad = None if (i, step) == (1, 3) else grad.to(leaf)
            optimizer.step(version=version)
        results.append(
            [p.detach().cpu() for v in range(stash.oldest, stash.newest + 1) for p in stash.parameters(v).values()]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Scaler:
    """The attributes that ``torch.amp.GradScaler`` sets on an optimizer for its step."""

    def __init__(self, scale: float, found: bool) -> None:
        self.grad_scale = torch.full((), scale, device=DEVICE)
        self.found_inf = torch.full((), float(found), device=DEVICE)


def refuse_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the host asks the device whether gradients have overflowed."""

    def asked(optimizer: npp.optim.FusedOptimizer) -> bool:
        assert not hasattr(optimizer, "found_inf"), "the host waits for the device"
        return False

    monkeypatch.setattr(npp.optim.FusedOptimizer, "_overflowed", asked)


def test_a_scheduled_momentum_and_raising_still_ask_the_host(backend):
    for options in ({"momentum": npp.optim.nag.convex_schedule}, {"momentum": 0.9, "on_nonfinite": "raise"}):
        p = nn.Parameter(torch.ones(5, device=DEVICE))
        optimizer = npp.NAG([p], lr=0.1, backend=backend, **options)
        p.grad = torch.full_like(p, float("inf"))
        optimizer.grad_scale, optimizer.found_inf = vars(Scaler(2.0, True)).values()
        optimizer.step()
        assert torch.equal(p, torch.ones_like(p))
        assert optimizer.state[p]["step"].device.type == "cpu"


def test_counts_come_back_when_nothing_is_scaled_any_more(backend):
    ps, plain = ([nn.Parameter(w.to(DEVICE)) for w in values(F32)] for _ in range(2))
    optimizer, judge = (npp.NAdam(leaves, backend=backend) for leaves in (ps, plain))
    for step in range(4):
        for leaves in (ps, plain):
            for p, g in zip(leaves, values(F32, seed=step), strict=True):
                p.grad = g.to(DEVICE)
        if step in (1, 2):
            optimizer.grad_scale, optimizer.found_inf = vars(Scaler(1.0, False)).values()
        optimizer.step()
        judge.step()
        assert {s["step"].device.type for s in optimizer.state.values()} == {DEVICE if step in (1, 2) else "cpu"}
        optimizer.__dict__.pop("found_inf", None), optimizer.__dict__.pop("grad_scale", None)
    for p, q in zip(ps, plain, strict=True):
        torch.testing.assert_close(p, q, **ROUNDED)
        assert float(optimizer.state[p]["step"]) == 4.0


@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("found", [False, True])
def test_the_scale_of_a_loss(limit, found, backend, monkeypatch):
    refuse_to_wait(monkeypatch)
    results = []
    for name, scaled in ((backend, True), (backend, False)):
        ps = [nn.Parameter(w.to(DEVICE)) for w in values(F32)]
        optimizer = npp.NAdam(ps, backend=name, max_grad_norm=limit)
        for p, g in zip(ps, values(F32, seed=1), strict=True):
            p.grad = g.to(DEVICE) * (1024 if scaled else 1)
        if scaled:
            optimizer.grad_scale, optimizer.found_inf = vars(Scaler(1024.0, found)).values()
        if scaled or not found:
            optimizer.step()
        counts = {s["step"].tolist() for s in optimizer.state.values()}
        assert counts == {0.0 if found else 1.0}
        results.append([p.detach().cpu() for p in ps])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **ROUNDED)


@pytest.mark.skipif(not GPU, reason="only a GPU can be waited for")
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_does_not_wait_for_the_device(scaled, backend):
    ps = [nn.Parameter(w.to(DEVICE)) for w in values(F32)]
    optimizer = npp.NAdam(ps, backend=backend, max_grad_norm=1.0)
    if scaled:
        optimizer.grad_scale, optimizer.found_inf = vars(Scaler(1.0, False)).values()
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()  # allocates and compiles
    for p in ps:
        p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it does not find all waiting
        torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_not_a_number_reaches_every_weight_and_raises_on_request(backend):
    ps = [nn.Parameter(w.to(DEVICE)) for w in values(F32)]
    optimizer = npp.NAdam(ps, backend=backend, on_nonfinite="raise")
    for p in ps:
        p.grad = torch.ones_like(p)
    ps[4].grad[7] = float("nan")
    before = [p.detach().clone() for p in ps]
    with pytest.raises(FloatingPointError, match="parameter 4 is not finite"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ps, before, strict=True))
    clipping = npp.NAdam(ps, backend=backend, max_grad_norm=1.0)
    clipping.step()
    assert all(bool(p.isnan().all()) for p in ps if p.numel())


def test_memory_replaced_behind_the_optimizers_back(backend):
    results = []
    for name in (backend, "cpu"):
        device = "cpu" if name == "cpu" else DEVICE
        ps = [nn.Parameter(w.to(device)) for w in values(F32)]
        optimizer = npp.NAdam(ps, backend=name)
        for step in range(4):
            for p, g in zip(ps, values(F32, seed=step), strict=True):
                p.grad = g.to(device)
            if step == 2:
                for p in ps:
                    p.data = p.data.clone()
            optimizer.step()
        results.append([p.detach().cpu() for p in ps])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: setattr(p, "data", p.data[:5]), "shape"),
        (lambda p: setattr(p, "data", p.data.double()), "Double|double|float64"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(spoil, message, backend):
    ps = [nn.Parameter(w.to(DEVICE)) for w in values(F32)]
    optimizer = npp.NAdam(ps, backend=backend)
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = [p.detach().clone() for p in ps]
    for p in ps:
        p.grad = torch.ones_like(p)
    spoil(ps[4])
    with pytest.raises((ValueError, RuntimeError), match=message):
        optimizer.step()
    others = [i for i in range(len(ps)) if i != 4]
    assert all(torch.equal(ps[i], before[i]) for i in others)
    assert {float(s["step"]) for s in optimizer.state.values()} == {1.0}


def test_counts_that_were_loaded_onto_the_device(backend):
    """``torch.load(..., map_location="cuda")`` moves the counts to the device."""
    results = []
    for name in (backend, "cpu"):
        device = "cpu" if name == "cpu" else DEVICE
        ps = [nn.Parameter(w.to(device)) for w in values(F32)]
        theirs = torch.optim.NAdam(ps)
        for p in ps:
            p.grad = torch.full_like(p, 0.1)
        theirs.step()
        saved = theirs.state_dict()
        for state in saved["state"].values():
            state.update({key: value.to(device) for key, value in state.items()})
        optimizer = npp.NAdam(ps, backend=name)
        optimizer.load_state_dict(saved)
        optimizer.step()
        results.append([p.detach().cpu() for p in ps])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **ROUNDED)


def test_nothing_to_step(backend):
    p = nn.Parameter(torch.ones(3, device=DEVICE), requires_grad=False)
    optimizer = npp.NAdam([p], backend=backend, max_grad_norm=1.0)
    optimizer.step()
    assert float(optimizer.last_grad_norm) == 0.0
    empty = npp.NAdam([nn.Parameter(torch.ones(0, device=DEVICE))], backend=backend, max_grad_norm=1.0)
    empty.param_groups[0]["params"][0].grad = torch.ones(0, device=DEVICE)
    empty.step()
    assert float(empty.last_grad_norm) == 0.0


def test_a_plan_is_let_go(backend):
    ps = [nn.Parameter(w.to(DEVICE)) for w in values(F32)]
    optimizer = npp.NAdam(ps, backend=backend)
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    gone = weakref.ref(ps[4])
    del ps, p, optimizer
    gc.collect()
    assert gone() is None


def test_several_devices_are_refused():
    if not GPU or torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU at most")
    ps = [nn.Parameter(torch.ones(3, device=f"cuda:{k}")) for k in range(2)]
    with pytest.raises(ValueError, match="one device, not of cuda:0 and cuda:1"):
        npp.NAdam(ps, backend="triton")


def test_the_choice():
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    available = npp.kernels.available_backends()
    fastest = next(name for name in (("cuda", "triton", "reference") if GPU else ("cpu",)) if available[name] is None)
    assert npp.NAdam([p]).backend == fastest
    if available["cuda"] is not None:
        with pytest.raises(ValueError, match="backend 'cuda' cannot be used: "):
            npp.NAdam([p], backend="cuda")
