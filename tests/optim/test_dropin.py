"""After changing one line, ``torch.optim.X`` -> ``nesterov_pp.X``, everything else that users do still works."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from backends import BACKENDS
from tolerances import MANY_STEPS
from torch.optim import optimizer as torch_optimizer

import nesterov_pp as npp

SHARED = ["NAdam", "AdamW"]
ALL = ["NAdam", "AdamW", "NAG"]
CLOSE = MANY_STEPS[torch.float32]


def pair(*values: torch.Tensor) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    ours, theirs = ([torch.nn.Parameter(v.clone()) for v in values] for _ in range(2))
    return ours, theirs


def give(ps, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def agree(ours, theirs) -> None:
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs], **CLOSE)


def start(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in [(7, 5), (9,)]]


@pytest.mark.parametrize("name", SHARED)
def test_the_constructor_is_torchs_with_keywords_after_it(name):
    ours = list(inspect.signature(getattr(npp, name).__init__).parameters.values())
    theirs = list(inspect.signature(getattr(torch.optim, name).__init__).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]
    assert {p.kind for p in ours[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}
    assert isinstance(getattr(npp, name)([torch.nn.Parameter(torch.ones(1))]), torch.optim.Optimizer)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("fused", [None, False, True])
def test_implementation_choices_change_nothing(name, foreach, fused):
    if name == "AdamW" and foreach and fused:
        with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
            npp.AdamW(start(), foreach=True, fused=True)
        return
    plain, chosen = pair(*start())
    for ps, extra in ((plain, {}), (chosen, {"foreach": foreach, "fused": fused})):
        optimizer = getattr(npp, name)(ps, **extra)
        give(ps, 1)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(plain, chosen, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.1},
        {"betas": (0.5, 0.7)},
        {"eps": 1e-2},
        {"weight_decay": 0.3},
        {"maximize": True},
        {"lr": -1e-3},
    ],
    ids=str,
)
def test_hyperparameters_changed_between_steps(change, name, backend):
    ours, theirs = pair(*start())
    for ps, optimizer in (
        (ours, getattr(npp, name)(ours, lr=1e-2, backend=backend)),
        (theirs, getattr(torch.optim, name)(theirs, lr=1e-2)),
    ):
        for t in range(6):
            if t == 3:
                optimizer.param_groups[0].update(change)
            give(ps, t)
            optimizer.step()
    agree(ours, theirs)


@pytest.mark.parametrize("named", [False, True])
def test_named_parameters_and_hooks(named):
    """Names are in the groups and the checkpoint, and all kinds of hooks are called in torch's order."""
    logs = []
    for cls in (npp.NAdam, torch.optim.NAdam):
        model = torch.nn.Linear(3, 2)
        optimizer = cls(model.named_parameters() if named else model.parameters())
        log: list[str] = []
        optimizer.register_step_pre_hook(lambda *_, log=log: log.append("step pre"))
        optimizer.register_step_post_hook(lambda *_, log=log: log.append("step post"))
        optimizer.register_state_dict_pre_hook(lambda *_, log=log: log.append("save pre"))
        optimizer.register_state_dict_post_hook(lambda *_, log=log: log.append("save post"))
        optimizer.register_load_state_dict_pre_hook(lambda *_, log=log: log.append("load pre"))
        optimizer.register_load_state_dict_post_hook(lambda *_, log=log: log.append("load post"))
        handles = [
            torch_optimizer.register_optimizer_step_pre_hook(lambda *_, log=log: log.append("global pre")),
            torch_optimizer.register_optimizer_step_post_hook(lambda *_, log=log: log.append("global post")),
        ]
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        for handle in handles:
            handle.remove()
        log.append(str(optimizer.state_dict()["param_groups"][0].get("param_names")))
        logs.append(log)
    assert logs[0] == logs[1]
    assert ("weight" in logs[0][-1]) == named


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(name, set_to_none):
    ps, _ = pair(*start())
    optimizer = getattr(npp, name)(ps)
    give(ps, 0)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) == set_to_none for p in ps)
    assert set_to_none or not any(p.grad.any() for p in ps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHARED)
def test_sizes_and_views(name, backend):
    """Parameters with no, one and many elements, and gradients that are expanded, transposed or sliced."""
    values = [torch.randn(s) for s in [(), (0,), (1,), (0, 5), (1, 1), (4, 6), (4, 6), (4, 6), (8,)]]
    ours, theirs = pair(*values)
    base = torch.randn(12, 12)
    grads = [torch.randn(v.shape) for v in values[:5]]
    grads += [base[:6, :4].t(), base[::3, ::2], torch.ones(1, 1).expand(4, 6), torch.ones(()).expand(8)]
    for ps, optimizer in (
        (ours, getattr(npp, name)(ours, backend=backend)),
        (theirs, getattr(torch.optim, name)(theirs)),
    ):
        for _ in range(3):
            for p, g in zip(ps, grads, strict=True):
                p.grad = g
            optimizer.step()
    agree(ours, theirs)


def test_an_expanded_parameter_is_refused_before_anything_is_written():
    p = torch.nn.Parameter(torch.ones(1).expand(4))
    optimizer = npp.NAdam([p])
    p.grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"^parameter 0 overlaps itself .*; give it memory of its own with clone"):
        optimizer.step()
    assert float(optimizer.state[p]["step"]) == 0
    assert not optimizer.state[p]["exp_avg"].any()


@pytest.mark.parametrize("name", SHARED)
def test_parameters_that_share_memory_are_stepped_one_after_the_other(name):
    results = []
    for module in (npp, torch.optim):
        base = torch.linspace(-1.0, 1.0, 8)
        ps = [torch.nn.Parameter(base[:5]), torch.nn.Parameter(base[3:])]
        optimizer = getattr(module, name)(ps)
        for t in range(3):
            give(ps, t)
            optimizer.step()
        results.append(base)
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters(name, dtype):
    values = [torch.randn(5, 3, dtype=dtype), torch.randn(4), torch.randn(2, dtype=dtype)]
    ours, theirs = pair(*values)
    optimizers = getattr(npp, name)(ours), getattr(torch.optim, name)(theirs)
    for ps, optimizer in zip((ours, theirs), optimizers, strict=True):
        for t in range(4):
            give(ps, t)
            optimizer.step()
    agree(ours, theirs)
    for p, q in zip(ours, theirs, strict=True):
        for key, value in optimizers[1].state[q].items():
            torch.testing.assert_close(optimizers[0].state[p][key], value, check_dtype=False, **CLOSE)
    conjugated = torch.nn.Parameter(values[0].clone())  # torch cannot step conjugated parameters
    conjugated.grad = ours[0].grad.conj()
    plain = torch.nn.Parameter(values[0].clone())
    plain.grad = ours[0].grad.conj().resolve_conj()
    for p in (conjugated, plain):
        getattr(npp, name)([p]).step()
    assert torch.equal(conjugated, plain)
    again = getattr(npp, name)(ours)
    again.load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    assert torch.equal(again.state[ours[0]]["exp_avg"], optimizers[0].state[ours[0]]["exp_avg"])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("NAdam", "NAdam does not support sparse gradients"),
        ("AdamW", "Adam does not support sparse gradients, please consider SparseAdam instead"),
    ],
)
@pytest.mark.parametrize("fresh", [True, False])
def test_sparse_gradients_are_refused_in_torchs_words(name, sentence, fresh):
    for module in (torch.optim, npp):
        p = torch.nn.Parameter(torch.ones(4, 2))
        optimizer = getattr(module, name)([p])
        if not fresh:
            optimizer.state.clear()
        p.grad = torch.eye(4, 2).to_sparse()
        with pytest.raises(RuntimeError) as error:
            optimizer.step()
        assert str(error.value) == sentence
        assert torch.equal(p.detach(), torch.ones(4, 2))


@pytest.mark.parametrize("name", ALL)
def test_capturable_is_refused_on_the_cpu_as_torch_does(name):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(AssertionError, match=r"If capturable=True, .* must be on supported devices: "):
        getattr(npp, name)([p], capturable=True).step()
    assert torch.equal(p.detach(), torch.ones(3))


@pytest.mark.parametrize("name", SHARED)
def test_differentiable_steps(name):
    """Gradients flow through three steps to the start and to the gradients."""

    def through(module) -> tuple[torch.Tensor, ...]:
        start = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
        slope = torch.linspace(0.5, 2, 5, dtype=torch.float64).requires_grad_()
        p = start.clone()
        optimizer = getattr(module, name)([p], lr=0.1, weight_decay=0.1, differentiable=True)
        for _ in range(3):
            p.grad = slope**2
            optimizer.step()
        return torch.autograd.grad((p**2).sum(), (start, slope))

    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)  # otherwise torch computes its bias corrections in float32
        with pytest.warns(RuntimeWarning, match="^differentiable=True uses the slower reference backend$"):
            ours = through(npp)
        theirs = through(torch.optim)
    finally:
        torch.set_default_dtype(default)
    torch.testing.assert_close(ours, theirs, **MANY_STEPS[torch.float64])
    with pytest.raises(RuntimeError, match="`fused` does not support `differentiable`"):
        npp.AdamW([torch.nn.Parameter(torch.ones(1))], fused=True, differentiable=True)


def test_amsgrad():
    ours, theirs = pair(*start())
    with pytest.warns(RuntimeWarning, match="^amsgrad=True uses the slower reference backend$"):
        optimizer = npp.AdamW(ours, amsgrad=True)
    other = torch.optim.AdamW(theirs, amsgrad=True)
    for ps, o in ((ours, optimizer), (theirs, other)):
        for t in range(6):
            give(ps, t)
            for p in ps:
                p.grad.mul_(6 - t)
            o.step()
    agree(ours, theirs)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(optimizer.state[p]["max_exp_avg_sq"], other.state[q]["max_exp_avg_sq"], **CLOSE)
    assert optimizer.backend == "reference"


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_replaced_or_cleared_by_hand_takes_effect(backend):
    ours, theirs = pair(*start())
    optimizers = npp.NAdam(ours, backend=backend), torch.optim.NAdam(theirs)
    for ps, optimizer in zip((ours, theirs), optimizers, strict=True):
        for t in range(8):
            if t == 2:
                optimizer.state[ps[0]]["exp_avg"] = torch.full_like(ps[0], 3.0)
            if t == 4:
                optimizer.state[ps[1]] = {}
            if t == 6:
                optimizer.state.clear()
            give(ps, t)
            optimizer.step()
    agree(ours, theirs)
    assert float(optimizers[0].state[ours[0]]["step"]) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_swapped_inside_the_groups(backend):
    """Accelerate swaps parameters inside the groups, before training and in the middle of it."""
    ours, theirs = pair(*start())
    for ps, optimizer in ((ours, npp.NAdam(ours, backend=backend)), (theirs, torch.optim.NAdam(theirs))):
        for t in range(6):
            if t in (0, 3):
                ps[0] = torch.nn.Parameter(ps[0].detach().clone())
                optimizer.param_groups[0]["params"][0] = ps[0]
            if t == 4:
                ps[1].data = ps[1].data.clone()
            give(ps, t)
            optimizer.step()
    agree(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_and_thawed(backend):
    ours, theirs = pair(*start())
    for ps, cls, extra in ((ours, npp.NAdam, {"backend": backend}), (theirs, torch.optim.NAdam, {})):
        ps[0].requires_grad_(False)
        optimizer = cls(ps, **extra)
        for t in range(6):
            give(ps, t)
            if t < 3:
                ps[0].grad = None
            if t == 3:
                ps[0].requires_grad_(True)
            optimizer.step()
    agree(ours, theirs)


@pytest.mark.parametrize("name", SHARED)
def test_old_checkpoints(name):
    """Old checkpoints have step counts that are plain numbers, and groups without newer options."""
    results = []
    source, _ = pair(*start())
    writer = getattr(torch.optim, name)(source)
    give(source, 0)
    writer.step()
    for module in (npp, torch.optim):
        ps = [torch.nn.Parameter(p.detach().clone()) for p in source]
        saved = copy.deepcopy(writer.state_dict())
        for group in saved["param_groups"]:
            for key in ("foreach", "maximize", "capturable", "differentiable", "amsgrad", "fused"):
                group.pop(key, None)
            if name == "NAdam":
                group.pop("decoupled_weight_decay")
        for entry in saved["state"].values():
            entry["step"] = int(entry["step"])
            if "mu_product" in entry:
                entry["mu_product"] = float(entry["mu_product"])
        optimizer = getattr(module, name)(ps)
        optimizer.load_state_dict(saved)
        for t in range(1, 4):
            give(ps, t)
            optimizer.step()
        assert float(optimizer.state[ps[0]]["step"]) == 4
        results.append(ps)
    agree(*results)


class Labelled(npp.NAdam):
    """A subclass with its own attribute."""

    label = "mine"


@pytest.mark.parametrize("cls", [Labelled, npp.AdamW, npp.NAG])
def test_copies_go_on_with_the_same_bits(cls):
    ps, _ = pair(*start())
    optimizer = cls(ps, max_grad_norm=1.0)
    give(ps, 0)
    optimizer.step()
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    give(ps, 1)
    optimizer.step()
    for copied in copies:
        qs = copied.param_groups[0]["params"]
        give(qs, 1)
        copied.step()
        assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))
        assert type(copied) is cls


def test_a_parameter_of_a_subclass_takes_the_fast_path():
    class Mine(torch.nn.Parameter):
        pass

    if "cpu" in BACKENDS:
        assert npp.NAdam([Mine(torch.ones(3))]).backend == "cpu"


def test_a_copy_on_write_parameter_leaves_its_source_alone():
    source = torch.ones(100)
    p = torch.nn.Parameter(torch._lazy_clone(source))
    p.grad = torch.ones(100)
    npp.NAdam([p]).step()
    assert (p.detach() < 1).all()
    assert (source == 1).all()
