"""Parameters and gradients of any layout, and tensors that are replaced between steps."""

from __future__ import annotations

import copy

import pytest
import torch
from backends import BACKENDS
from parity import (
    ALL,
    OURS,
    TORCH,
    assert_bits,
    assert_same_as_torch,
    detached,
    give,
    parameters,
    values,
)
from tolerances import MANY_STEPS

SHAPE = (2, 3, 4, 4)
LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "channels last": lambda t: t.clone(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "strided": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    "offset": lambda t: torch.cat([t.new_ones(1, 3, 4, 4), t])[1:],
}
GRADIENTS = {**LAYOUTS, "expanded": lambda t: t[:1, :, :1, :1].expand(t.shape)}


def base() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("grad", GRADIENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_beside_every_other(layout, grad, name):
    def scenario(make):
        p = torch.nn.Parameter(LAYOUTS[layout](base()))
        optimizer = make([p], lr=0.01)
        strides = p.stride()
        for t in range(3):
            g = torch.randn(SHAPE, generator=torch.Generator().manual_seed(t))
            p.grad = GRADIENTS[grad](g)
            optimizer.step()
            torch.testing.assert_close(p.grad, GRADIENTS[grad](g), rtol=0, atol=0)  # the gradient was read, not written
        assert p.stride() == strides
        return [p.detach()]

    assert_same_as_torch(name, scenario)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("others", [0, 2])
def test_expanded_parameters_are_refused_by_name(name, named, others):
    p = torch.nn.Parameter(torch.ones(3, 1).expand(3, 4))
    ps = [*parameters()[:others], p]
    optimizer = OURS[name]([(f"layer.{i}", q) for i, q in enumerate(ps)] if named else ps)
    give(ps, 0)
    before, state = [q.detach().clone() for q in ps], copy.deepcopy(optimizer.state_dict()["state"])
    label = f"layer.{others}" if named else f"parameter {others}"
    with pytest.raises(ValueError, match=label):
        optimizer.step()
    assert_bits(detached(ps), before)
    assert str(state) == str(optimizer.state_dict()["state"])


@pytest.mark.parametrize("name", ALL)
def test_parameters_that_overlap_themselves_without_being_expanded(name):
    """With rows one element apart, the result is torch's, or a refusal that changes nothing."""

    def build():
        base = torch.linspace(-1.0, 1.0, 5)
        p = torch.nn.Parameter(base.as_strided((3, 3), (1, 1)))
        p.grad = torch.arange(9.0).view(3, 3)
        return base, p

    base, p = build()
    optimizer = OURS[name]([p])
    refusal = ""
    try:
        optimizer.step()
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert "parameter 0" in refusal
        assert torch.equal(base, torch.linspace(-1.0, 1.0, 5))
        assert float(optimizer.state[p]["step"]) == 0
    else:
        expected, q = build()
        TORCH[name]([q]).step()
        torch.testing.assert_close(base, expected, **MANY_STEPS[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("to", ["memory of its own", "a view", "channels last", "a gap"])
def test_data_reassigned_between_steps(name, to, backend):
    if backend != "reference" and to == "a gap":
        pytest.skip("the kernels say that they take dense tensors only")

    def scenario(make):
        p = torch.nn.Parameter(base())
        optimizer = make([p], lr=0.01)
        storage = torch.zeros(4, *SHAPE)
        for t in range(6):
            if t == 3:
                new = {
                    "memory of its own": lambda v: v + 1,
                    "a view": lambda v: storage[2].copy_(v),
                    "channels last": lambda v: v.contiguous(memory_format=torch.channels_last),
                    "a gap": lambda v: v.repeat_interleave(2, dim=3)[..., ::2],
                }[to]
                p.data = new(p.data)
            give([p], t)
            optimizer.step()
        return [p.detach(), *([storage] if to == "a view" else [])]

    assert_same_as_torch(name, scenario, backend=backend)


@pytest.mark.parametrize("name", ALL)
def test_only_empty_parameters(name):
    ps = [torch.nn.Parameter(torch.empty(0)), torch.nn.Parameter(torch.empty(3, 0))]
    optimizer = OURS[name](ps, max_grad_norm=1.0, on_nonfinite="raise")
    for t in range(2):
        give(ps, t)
        optimizer.step()
    assert float(optimizer.last_grad_norm) == 0.0
    assert float(optimizer.state[ps[1]]["step"]) == 2


@pytest.mark.parametrize("name", ALL)
def test_a_step_without_any_gradient_changes_nothing(name):
    ps = parameters()
    optimizer = OURS[name](ps, max_grad_norm=1.0)
    optimizer.step()
    assert_bits(detached(ps), values())
    assert all(float(s["step"]) == 0 for s in optimizer.state.values())
