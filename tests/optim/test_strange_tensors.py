"""Tensors without their own memory, with bits that change their values, or of other modes: torch's result if torch
steps, otherwise one sentence and nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import BACKENDS
from strange import Wrapped, conjugated, cut_short, fake, freed, in_inference_mode, left_by_a_transform, masked, negated
from tolerances import MANY_STEPS
from torch import nn
from torch._subclasses import FakeTensorMode

import nesterov_pp as npp

CLOSE: dict[str, Any] = {**MANY_STEPS[torch.float32], "check_device": False}
"""Under a default device torch keeps its step counts there."""
SHARED = ["NAdam", "AdamW"]


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape or (37,), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def snapshot(ps: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> Any:
    def kept(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    states = [{k: kept(v) for k, v in optimizer.state[p].items()} for p in ps if p in optimizer.state]
    return [p.detach().clone() for p in ps], states


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.resolve_neg().resolve_conj(), b.resolve_neg().resolve_conj())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b))


def trained(name: str, backend: str | None, values: list[torch.Tensor], grads: Callable[[int, int], Any]) -> Any:
    """Take three steps with gradient ``grads(t, i)`` for parameter i in step t; backend None is torch's optimizer."""
    ps = [nn.Parameter(v) for v in values]
    cls, extra = (getattr(torch.optim, name), {}) if backend is None else (getattr(npp, name), {"backend": backend})
    optimizer = cls(ps, lr=1e-2, weight_decay=0.1, **extra)
    for t in range(3):
        for i, p in enumerate(ps):
            p.grad = grads(t, i)
        optimizer.step()
    return [p.detach().resolve_neg().resolve_conj() for p in ps], [
        {k: v.resolve_neg().resolve_conj() for k, v in optimizer.state[p].items()} for p in ps
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHARED)
def test_a_gradient_of_zeros_without_memory(name, backend):
    """The backward of ``sgn`` makes such gradients."""

    def ends(which: str | None) -> Any:
        p = nn.Parameter(numbers(0))
        cls, extra = (getattr(torch.optim, name), {}) if which is None else (getattr(npp, name), {"backend": which})
        optimizer = cls([p], lr=1e-2, **extra)
        for t in range(4):
            optimizer.zero_grad()
            (torch.sgn(p) if t % 2 else p.square()).sum().backward()
            assert p.grad._is_zerotensor() == bool(t % 2)
            optimizer.step()
        return snapshot([p], optimizer)

    torch.testing.assert_close(ends(backend), ends(None), **CLOSE)


GRADIENTS = {
    "zeros without memory": lambda t, i: torch._efficientzerotensor(37, device=torch.get_default_device()),
    "negated": lambda t, i: negated(numbers(t * 7 + i)),
    "negated, of another layout": lambda t, i: negated(numbers(t * 7 + i, 37, 2))[:, 1],
    "under a conjugate": lambda t, i: torch.complex(numbers(t), numbers(t + i)).conj().imag,
    "wrapped": lambda t, i: Wrapped(numbers(t * 7 + i)) if i else numbers(t),
    "copied on write": lambda t, i: torch._lazy_clone(numbers(t + i)),
    "expanded": lambda t, i: numbers(t + i, 1).expand(37),
    "in inference mode": lambda t, i: in_inference_mode(numbers(t + i)),
    "that require gradients": lambda t, i: numbers(t + i).requires_grad_() * 2,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("grads", GRADIENTS.values(), ids=GRADIENTS)
def test_strange_gradients_count_by_their_values(grads, name, backend):
    values = [numbers(100), numbers(101)]
    ours = trained(name, backend, [v.clone() for v in values], grads)
    theirs = trained(name, None, [v.clone() for v in values], grads)
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHARED)
def test_lazily_negated_gradients_of_autograd(name, backend):
    """With real parameters under a conjugate, the gradient of the imaginary part carries the negative bit."""

    def ends(which: str | None) -> Any:
        re, im = nn.Parameter(numbers(0)), nn.Parameter(numbers(1))
        cls, extra = (getattr(torch.optim, name), {}) if which is None else (getattr(npp, name), {"backend": which})
        optimizer = cls([re, im], lr=1e-2, **extra)
        for _ in range(3):
            optimizer.zero_grad()
            (torch.complex(re, im).conj() * torch.complex(numbers(2), numbers(3))).real.square().sum().backward()
            optimizer.step()
        return snapshot([re, im], optimizer)

    torch.testing.assert_close(ends(backend), ends(None), **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("shape", [(), (5, 3)], ids=["scalar", "matrix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_parameters_under_a_bit(dtype, shape, name, backend):
    """Negated and conjugated parameters are stepped like the same values without the bit, in their own memory."""
    plain = [torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=dtype) for i in range(2)]
    lazy = [negated(v) for v in plain] if dtype == torch.float32 else [conjugated(plain[0]), negated(plain[1])]

    def grads(t: int, i: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(10 * t + i), dtype=dtype)

    ours = trained(name, backend, lazy, grads)
    theirs = trained(name, None, [v.clone() for v in plain], grads)
    torch.testing.assert_close(ours[0], theirs[0], **CLOSE)
    for mine, torchs in zip(ours[1], theirs[1], strict=True):
        for key, value in torchs.items():
            torch.testing.assert_close(mine[key], value, check_dtype=False, **CLOSE)
    assert not torch.equal(lazy[0].resolve_neg().resolve_conj(), plain[0])  # it was written in its own memory


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", ["step", "mu_product", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_state_under_a_bit(dtype, entry, backend):
    ends = []
    for cls, extra in ((npp.NAdam, {"backend": backend}), (torch.optim.NAdam, {"foreach": False})):
        p = nn.Parameter(numbers(0, dtype=dtype))
        optimizer = cls([p], **extra)
        p.grad = numbers(1, dtype=dtype)
        optimizer.step()
        optimizer.state[p][entry] = negated(optimizer.state[p][entry])
        optimizer.step()
        ends.append([p.detach(), *(v.resolve_neg() for _, v in sorted(optimizer.state[p].items()))])
    torch.testing.assert_close(*ends, check_dtype=False, **CLOSE)


REFUSED = {
    "freed": (lambda: freed(torch.ones(37)), "has a storage smaller than its shape"),
    "cut short": (lambda: cut_short(torch.ones(37)), "has a storage smaller than its shape"),
    "masked": (lambda: masked(torch.ones(37)), "is a MaskedTensor, .* and cannot update the parameter"),
    "fake": (lambda: fake(torch.ones(37)), "is a FakeTensor, .* and cannot update the parameter"),
    "of a transform": (lambda: left_by_a_transform(torch.ones(37)), "belongs to a transform of torch.func"),
    "on meta": (lambda: torch.ones(37, device="meta"), "meta"),
}


def set_gradient(p: torch.Tensor, grad: torch.Tensor) -> None:
    """Set a gradient, even one that ``p.grad = grad`` refuses but ``.data`` and other frameworks allow."""
    try:
        p.grad = grad
    except (RuntimeError, TypeError):
        pytest.skip("torch lets no such gradient in")


@pytest.mark.filterwarnings("ignore:.*MaskedTensor")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("make", "sentence"), REFUSED.values(), ids=REFUSED)
def test_gradients_that_cannot_be_are_refused(make, sentence, backend):
    ps = [nn.Parameter(numbers(i)) for i in range(3)]
    optimizer = npp.NAdam(ps, backend=backend)
    for p in ps:
        p.grad = torch.ones(37)
    optimizer.step()
    set_gradient(ps[1], make())
    before = snapshot(ps, optimizer)
    with pytest.raises(ValueError, match=sentence) as error:
        optimizer.step()
    assert "parameter 1" in str(error.value)
    assert same(snapshot(ps, optimizer), before)
    ps[1].grad = torch.ones(37)
    optimizer.step()
    assert float(optimizer.state[ps[1]]["step"]) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: freed(torch.zeros(37)), "has a storage smaller than its shape"),
        (
            lambda: torch._efficientzerotensor(37, device=torch.get_default_device()),
            "is a tensor of zeros without memory",
        ),
        (lambda: in_inference_mode(torch.zeros(37)), "is an inference tensor"),
    ],
    ids=["freed", "zeros without memory", "in inference mode"],
)
def test_state_that_cannot_be_written_is_refused(make, sentence, entry, backend):
    ps = [nn.Parameter(numbers(i)) for i in range(2)]
    optimizer = npp.NAdam(ps, backend=backend)
    for p in ps:
        p.grad = torch.ones(37)
    optimizer.step()
    whole = optimizer.state[ps[1]][entry]
    optimizer.state[ps[1]][entry] = make()
    weights, state = [p.detach().clone() for p in ps], copy.deepcopy(dict(optimizer.state[ps[0]]))
    with pytest.raises(ValueError, match=sentence):
        optimizer.step()
    assert all(map(torch.equal, ps, weights))
    assert same(dict(optimizer.state[ps[0]]), state)
    optimizer.state[ps[1]][entry] = whole
    optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_freed_parameter_is_refused(backend):
    ps = [nn.Parameter(numbers(i)) for i in range(2)]
    optimizer = npp.NAdam(ps, backend=backend)
    for p in ps:
        p.grad = torch.ones(37)
    bytes_of = ps[1].untyped_storage().nbytes()
    ps[1].untyped_storage().resize_(0)  # as FSDP1 does between uses
    with pytest.raises(ValueError, match=r"^parameter 1 has a storage smaller than its shape"):
        optimizer.step()
    assert torch.equal(ps[0].detach(), numbers(0))
    assert float(optimizer.state[ps[0]]["step"]) == 0
    ps[1].untyped_storage().resize_(bytes_of)
    ps[1].data.fill_(1.0)
    optimizer.step()
    assert (ps[1].detach() < 1).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_state_of_a_subclass_is_stepped_by_its_own_operators(backend):
    """Users do this to keep moments in their own format."""
    ends = []
    for cls, extra in ((npp.NAdam, {"backend": backend}), (torch.optim.NAdam, {})):
        p = nn.Parameter(numbers(0))
        optimizer = cls([p], **extra)
        p.grad = numbers(1)
        optimizer.step()
        optimizer.state[p]["exp_avg"] = Wrapped(optimizer.state[p]["exp_avg"].clone())
        optimizer.step()
        optimizer.step()
        ends.append([p.detach(), optimizer.state[p]["exp_avg"].inner])
    torch.testing.assert_close(*ends, **CLOSE)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", SHARED)
def test_parameters_of_a_subclass_are_stepped_by_its_own_operators(name, backend):
    """Quantised weights are such subclasses: here, two tensors that look like one, next to an ordinary parameter."""
    from torch.testing._internal.two_tensor import TwoTensor

    ends = []
    for which in (backend, None):
        p, q = nn.Parameter(TwoTensor(numbers(0), numbers(1))), nn.Parameter(numbers(2))
        cls, extra = (getattr(torch.optim, name), {}) if which is None else (getattr(npp, name), {"backend": which})
        optimizer = cls([p, q], lr=1e-2, **extra)
        for t in range(3):
            p.grad, q.grad = TwoTensor(numbers(3 + t), numbers(6 + t)), numbers(9 + t)
            optimizer.step()
        first = optimizer.state[p]["exp_avg"]
        ends.append([p.detach().a, p.detach().b, q.detach(), first.a, first.b])
    torch.testing.assert_close(*ends, **CLOSE)


# ---------------------------------------------------------------------- modes


@pytest.mark.parametrize("name", ["NAdam", "AdamW", "NAG"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_made_in_inference_mode(name, backend):
    p = nn.Parameter(numbers(0))
    with torch.inference_mode():
        optimizer = getattr(npp, name)([p], backend=backend)
        optimizer.load_state_dict(optimizer.state_dict())
    plain = nn.Parameter(numbers(0))
    other = getattr(npp, name)([plain], backend=backend)
    for q, o in ((p, optimizer), (plain, other)):
        q.grad = numbers(1)
        o.step()
        with torch.inference_mode():
            o.step()
        o.step()
    assert torch.equal(p, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_of_inference_mode_is_refused_outside_before_anything_is_written(backend):
    with torch.inference_mode():
        p = nn.Parameter(numbers(0))
    other = nn.Parameter(numbers(1))
    optimizer = npp.NAdam([other, p], backend=backend)
    for q in (other, p):
        q.grad = torch.ones(37)
    with pytest.raises(ValueError, match=r"^parameter 1 is an inference tensor, which only inference mode may write"):
        optimizer.step()
    assert torch.equal(other.detach(), numbers(1))
    with torch.inference_mode():
        optimizer.step()
    assert not torch.equal(other.detach(), numbers(1))


@pytest.mark.parametrize("name", SHARED)
def test_fake_parameters_are_stepped_as_torch_does(name):
    """Fake tensors show what a step would need without taking it."""
    with FakeTensorMode():
        for module in (torch.optim, npp):
            p = nn.Parameter(torch.randn(5, 3))
            optimizer = getattr(module, name)([p])
            for _ in range(2):
                p.grad = torch.ones(5, 3)
                optimizer.step()
            assert optimizer.state[p]["exp_avg"].shape == (5, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_real_parameters_are_not_stepped_under_a_fake_mode(backend):
    p = nn.Parameter(numbers(0))
    optimizer = npp.NAdam([p], backend=backend)
    p.grad = torch.ones(37)
    with FakeTensorMode(), pytest.raises(ValueError, match="takes FakeTensor parameters only"):
        optimizer.step()
    assert torch.equal(p.detach(), numbers(0))
    assert float(optimizer.state[p]["step"]) == 0


def test_a_transform_may_not_write_captured_parameters():
    """torch refuses this too, but only after changing the moments."""
    p = nn.Parameter(numbers(0))
    p.grad = torch.ones(37)
    optimizer = npp.NAdam([p])

    def f(x: torch.Tensor) -> torch.Tensor:
        optimizer.step()
        return x.sum()

    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        torch.func.grad(f)(torch.ones(3))
    assert torch.equal(p.detach(), numbers(0))
    assert float(optimizer.state[p]["step"]) == 0
    assert not optimizer.state[p]["exp_avg"].any()
    optimizer.step()
    assert not torch.equal(p.detach(), numbers(0))
