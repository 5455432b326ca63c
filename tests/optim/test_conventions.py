"""Behaviour that users of torch.optim rely on: state, groups, layouts, clear errors before anything is written."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from backends import BACKENDS
from tolerances import MANY_STEPS

import nesterov_pp as npp


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(4, 3), (5,), (2, 2, 2)]]


def give_gradients(ps: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["NAdam", "AdamW"])
def test_state_dict_is_torchs_in_both_directions(name, backend):
    theirs, ours = parameters(), parameters()
    torch_optimizer = getattr(torch.optim, name)(theirs, lr=1e-2)
    our_optimizer = getattr(npp, name)(ours, lr=1e-2, backend=backend)
    for t in range(3):
        give_gradients(theirs, t)
        give_gradients(ours, t)
        torch_optimizer.step()
        our_optimizer.step()
    theirs_saved, ours_saved = torch_optimizer.state_dict(), our_optimizer.state_dict()
    assert theirs_saved["param_groups"] == ours_saved["param_groups"]
    assert {k: set(s) for k, s in theirs_saved["state"].items()} == {k: set(s) for k, s in ours_saved["state"].items()}
    for key, value in theirs_saved["state"][0].items():
        assert ours_saved["state"][0][key].dtype == value.dtype
        assert ours_saved["state"][0][key].shape == value.shape
    torch_optimizer.load_state_dict(ours_saved)
    our_optimizer.load_state_dict(theirs_saved)
    for t in range(3, 6):
        give_gradients(theirs, t)
        give_gradients(ours, t)
        torch_optimizer.step()
        our_optimizer.step()
    torch.testing.assert_close(ours, theirs, **MANY_STEPS[torch.float32])


@pytest.mark.parametrize("optimizer_class", [npp.NAdam, npp.AdamW, npp.NAG, npp.Lion])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_save_load_and_go_on_is_bit_exact(optimizer_class, dtype, tmp_path):
    whole, resumed = ([torch.nn.Parameter(p.detach().to(dtype)) for p in parameters()] for _ in range(2))
    one, other = optimizer_class(whole), optimizer_class(resumed)
    for t in range(10):
        for ps, optimizer in ((whole, one), (resumed, other)):
            give_gradients(ps, t)
            optimizer.step()
        if t == 4:
            torch.save(other.state_dict(), tmp_path / "state.pt")
            other = optimizer_class(resumed)
            other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("saved", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("loaded", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_state_saved_with_parameters_of_another_dtype_loads(saved, loaded, backend):
    def optimizer_of(dtype: torch.dtype) -> npp.NAdam:
        ps = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters()]
        give_gradients(ps, 0)
        return npp.NAdam(ps, backend=backend)

    one, other = optimizer_of(saved), optimizer_of(loaded)
    one.step()
    other.load_state_dict(one.state_dict())
    other.step()
    assert {float(s["step"]) for s in other.state.values()} == {2}
    assert all(p.isfinite().all() for p in other.param_groups[0]["params"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_schedules_and_missing_gradients(backend):
    """Groups with their own options, one added later, a scheduled rate, and parameters that sit out some steps."""
    theirs, ours = parameters(), parameters()
    optimizers = []
    for ps, cls, extra in ((theirs, torch.optim.NAdam, {}), (ours, npp.NAdam, {"backend": backend})):
        optimizer = cls([{"params": ps[:1], "lr": 1e-2}, {"params": ps[1:2], "betas": (0.5, 0.9)}], **extra)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for t in range(12):
            if t == 4:
                optimizer.add_param_group({"params": ps[2:], "weight_decay": 0.1})
            give_gradients(ps, t)
            if t % 3 == 0:
                ps[0].grad = None
            optimizer.step()
            scheduler.step()
        optimizers.append(optimizer)
    torch.testing.assert_close(ours, theirs, **MANY_STEPS[torch.float32])
    assert float(optimizers[1].state[ours[0]]["step"]) == float(optimizers[0].state[theirs[0]]["step"]) == 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_closure_and_copies(backend):
    ps = parameters()
    optimizer = npp.NAdam(ps, backend=backend, max_grad_norm=2.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in ps)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.max_grad_norm == 2.0
        assert copied.backend == backend
        for p, q in zip(optimizer.param_groups[0]["params"], copied.param_groups[0]["params"], strict=True):
            q.grad = p.grad.clone()
        copied.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_whose_memory_format_changes_goes_on(backend):
    """``model.to(memory_format=...)`` moves parameters whose optimizer already has state."""
    torch.manual_seed(0)
    ours = torch.nn.Conv2d(3, 8, 3)
    theirs = copy.deepcopy(ours)
    x = torch.randn(2, 3, 8, 8)
    optimizer = npp.NAdam(ours.parameters(), backend=backend)
    for model, o in ((ours, optimizer), (theirs, torch.optim.NAdam(theirs.parameters()))):
        for t in range(4):
            if t == 2:
                model.to(memory_format=torch.channels_last)
            o.zero_grad()
            model(x).square().mean().backward()
            o.step()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), **MANY_STEPS[torch.float32])
    if backend == "cpu":
        assert optimizer.state[ours.weight]["exp_avg"].stride() == ours.weight.stride()


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "mixed"])
def test_layouts(layout):
    """The memory layouts of parameters and gradients do not change the result."""
    base = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    if layout == "channels_last":
        value = base.clone(memory_format=torch.channels_last)
    elif layout == "transposed":
        value = base.clone().transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "strided":
        value = base.repeat_interleave(2, dim=3)[..., ::2]
    else:
        value = base.clone()
    ours, theirs = torch.nn.Parameter(value), torch.nn.Parameter(base.clone())
    optimizer, reference = npp.NAdam([ours], lr=1e-2), npp.NAdam([theirs], lr=1e-2)
    for t in range(5):
        g = torch.randn(base.shape, generator=torch.Generator().manual_seed(t + 1))
        ours.grad = g.clone(memory_format=torch.channels_last) if layout == "mixed" else g.clone()
        theirs.grad = g.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_swapped_and_late_parameters():
    """Frameworks replace parameters in ``param_groups`` after construction, and unfreeze others."""
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = npp.NAdam([torch.nn.Parameter(torch.ones(3)), frozen])
    swapped = torch.nn.Parameter(torch.ones(4))
    optimizer.param_groups[0]["params"][0] = swapped
    swapped.grad = torch.ones(4)
    optimizer.step()
    assert (swapped < 1).all()
    assert torch.equal(frozen, torch.ones(3))
    frozen.requires_grad_(True)
    frozen.grad = torch.ones(3)
    optimizer.step()
    assert (frozen < 1).all()


def test_distributed_checkpoints_state_before_the_first_step_changes_nothing():
    """``torch.distributed.checkpoint`` steps optimizers that have no state; ours have state from the start."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        optimizer = npp.NAdam(model.parameters(), lr=1e-2)
        x = torch.randn(8, 4)
        for t in range(6):
            if checkpointed and t in (0, 3):
                saved = get_optimizer_state_dict(model, optimizer)
                set_optimizer_state_dict(model, optimizer, saved)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
        assert {float(s["step"]) for s in optimizer.state.values()} == {6}
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_step_is_seen_by_autograd():
    """A graph that still needs the old weights raises an error instead of using the new ones."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = npp.NAdam([p], backend=BACKENDS[0])
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["NAdam", "AdamW"])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": torch.ones(2)},
        {"eps": -1e-8},
        {"betas": (1.0, 0.999)},
        {"betas": (0.9, -0.1)},
        {"weight_decay": -0.1},
    ],
)
def test_bad_hyperparameters_are_refused_in_torchs_words(name, options):
    with pytest.raises(ValueError) as theirs:
        getattr(torch.optim, name)(parameters(), **options)
    with pytest.raises(ValueError) as ours:
        getattr(npp, name)(parameters(), **options)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda ps: npp.NAdam(ps, momentum_decay=-1), "Invalid momentum_decay value: -1"),
        (lambda ps: npp.NAG(ps, momentum=1.0), "Invalid momentum value: 1.0"),
        (lambda ps: npp.NAG(ps, momentum=lambda t: float(t)), "Invalid momentum value: 1.0"),
        (lambda ps: npp.NAdam(ps, max_grad_norm=0.0), "max_grad_norm"),
        (lambda ps: npp.NAdam(ps, backend="gpu"), "unknown backend 'gpu'; choose one of auto, cuda"),
        (lambda ps: npp.NAdam(ps, backend="cuda"), "backend 'cuda' cannot be used: "),
        (
            lambda ps: npp.NAdam([ps[0].detach().to("meta").requires_grad_()], backend="cpu"),
            "not strided float32 on meta",
        ),
        (lambda ps: npp.NAdam(ps, state_dtype=torch.float16), "Invalid state_dtype: torch.float16; choose one of None"),
        (
            lambda ps: npp.NAdam([ps[0].detach().double().requires_grad_()], state_dtype=torch.float32),
            "state_dtype=torch.float32 cannot hold the moments of float64 parameters",
        ),
        (lambda ps: npp.NAdam([]), "empty parameter list"),
        (lambda ps: npp.NAdam(ps).step(version=0), "needs an optimizer built with stash="),
        (lambda ps: npp.NAdam(ps).step(microbatches=0), "microbatches must be a whole number of at least 1, not 0"),
    ],
)
def test_bad_arguments_give_one_clear_sentence(make, sentence):
    with pytest.raises(ValueError) as error:
        make(parameters())
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda o, ps: o.state[ps[1]].__setitem__("exp_avg", torch.ones(6)), "first moment of parameter 1 has shape"),
        (lambda o, ps: o.state[ps[1]].__setitem__("exp_avg_sq", torch.ones(6)), "second moment of parameter 1"),
        (lambda o, ps: setattr(ps[2], "data", torch.zeros(3)), "of parameter 2 has shape"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(backend, break_it, sentence):
    ps = parameters()
    optimizer = npp.NAdam(ps, backend=backend)
    give_gradients(ps, 0)
    break_it(optimizer, ps)
    before = [p.detach().clone() for p in ps]
    with pytest.raises(ValueError) as error:
        optimizer.step()
    assert sentence in str(error.value)
    assert all(torch.equal(p, q) for p, q in zip(ps, before, strict=True))
    assert float(optimizer.state[ps[0]]["step"]) == 0


class Pair(Sequence):
    """A custom sequence type, as configuration libraries have."""

    def __init__(self, *values):
        self.values = values

    def __getitem__(self, i):
        return self.values[i]

    def __len__(self):
        return len(self.values)


@pytest.mark.parametrize("name", ["NAdam", "AdamW"])
@pytest.mark.parametrize("betas", [[0.8, 0.9], Pair(0.8, 0.9)], ids=["list", "sequence"])
def test_betas_of_any_pair_and_numbers_of_numpy(betas, name):
    results = []
    for module in (npp, torch.optim):
        ps = parameters()
        optimizer = getattr(module, name)(ps, lr=np.array(0.1), betas=betas)
        for t in range(4):
            give_gradients(ps, t)
            if t == 2:
                optimizer.param_groups[0].update(betas=np.array([0.7, 0.95]), lr=np.float32(0.05))
            optimizer.step()
        results.append([p.detach() for p in ps])
    torch.testing.assert_close(*results, **MANY_STEPS[torch.float32])


@pytest.mark.parametrize(
    "options",
    [
        {"lr": torch.tensor(0.1), "foreach": True},
        {"betas": (0.9, torch.tensor(0.99))},
        {"betas": (torch.tensor(0.9), 0.99)},
        {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": True},
    ],
    ids=str,
)
def test_tensors_that_adamw_refuses_as_torch_does(options):
    errors = []
    for module in (npp, torch.optim):
        with pytest.raises(ValueError) as error:
            module.AdamW(parameters(), **options)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
