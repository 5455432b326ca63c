"""Every microbatch uses the right version, and no gradient is silently wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from layers import LAYERS, data, gradients, layer, objective
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import nesterov_pp as npp
from nesterov_pp import WeightStash


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_late_backward_differentiates_at_the_version_of_its_forward(kind, compiled):
    """With microbatches in flight over three updates, each gradient is that of a frozen copy of its version."""
    if compiled and kind == "lstm":
        pytest.skip("torch.compile leaves recurrent layers to eager mode")
    torch._dynamo.reset()
    module = layer(kind)
    stash = WeightStash(module, versions=4)
    optimizer = npp.NAdam(module.parameters(), lr=0.1, stash=stash)
    call = torch.compile(module, backend="aot_eager") if compiled else module
    frozen, waiting = {}, {}
    for v in range(4):
        frozen[v] = copy.deepcopy(module)
        x = data(v).requires_grad_()
        with stash.use(v):
            waiting[v] = (x, objective(call(x)))
        if v < 3:
            for leaf in stash.parameters(v).values():
                leaf.grad = torch.ones_like(leaf)
            optimizer.step(version=v)
            for p, q in zip(module.parameters(), frozen[v].parameters(), strict=True):
                assert not torch.equal(p, q)
    for v, (x, loss) in waiting.items():
        loss.backward()
        expected = gradients(frozen[v], data(v))
        torch.testing.assert_close(x.grad, expected[0], rtol=1e-12, atol=1e-12)
        got = [leaf.grad for leaf in stash.parameters(v).values()]
        torch.testing.assert_close(got, expected[1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", [k for k in LAYERS if k != "lstm"])
def test_an_overwritten_version_never_gives_a_silently_wrong_gradient(kind, compiled):
    """If the ring is forced to overwrite a version in flight, backward raises, or is exact if it needs no weight."""
    torch._dynamo.reset()
    module = layer(kind)
    call = torch.compile(module, backend="aot_eager") if compiled else module
    stash = WeightStash(module, versions=1)
    optimizer = npp.NAdam(module.parameters(), lr=0.1, stash=stash)
    frozen = copy.deepcopy(module)
    x = data(0).requires_grad_()
    with stash.use(0):
        loss = objective(call(x))
    stash.release(0)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    raised = None
    try:
        loss.backward()
    except RuntimeError as error:
        raised = str(error)
    if raised is not None:
        assert ("modified by an inplace operation" if compiled else "version 0, which has left the ring") in raised
    else:
        torch.testing.assert_close(x.grad, gradients(frozen, data(0))[0], rtol=1e-12, atol=1e-12)
    assert raised is not None or kind == "embedding", "every other layer needs its weights to go backward"


@pytest.mark.parametrize("kind", [k for k in LAYERS if k not in ("encoder", "lstm", "tied")])
def test_backward_at_the_newest_weights(kind):
    """Without a stash, backward uses the activations of the old version and the weights of the newest.

    The reference is the same layer with its weights overwritten behind autograd's back between forward and backward.
    """
    module, overwritten = layer(kind), layer(kind)
    stash = WeightStash(module, 3)
    optimizer = npp.NAdam(module.parameters(), lr=0.5, stash=stash)
    x, y = data(0).requires_grad_(), data(0).requires_grad_()
    with stash.use(0, linearise_at="newest"):
        loss = objective(module(x))
    expected = objective(overwritten(y))
    for _ in range(2):
        for leaf in stash.parameters(stash.newest).values():
            leaf.grad = torch.ones_like(leaf)
        optimizer.step(version=stash.newest)
    for leaf in stash.parameters(0).values():
        leaf.grad = None
    for p, q in zip(overwritten.parameters(), module.parameters(), strict=True):
        p.data.copy_(q)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    got = [leaf.grad for leaf in stash.parameters(0).values()]
    torch.testing.assert_close(got, [p.grad for p in overwritten.parameters()], rtol=1e-12, atol=1e-12)
    if kind in ("linear", "matmul", "gain", "layernorm"):
        stashed = gradients(layer(kind), data(0))[0]
        assert not torch.allclose(x.grad, stashed), "the old weights would have given another gradient"


def test_backward_at_the_newest_weights_refuses_autocast():
    stash = WeightStash(nn.Linear(8, 8), 2)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match="cannot see through"),
        stash.use(0, linearise_at="newest"),
    ):
        pass
    assert stash.in_flight(0) == 0


@pytest.mark.slow
def test_rotating_slots_compile_once():
    """All slots hold parameters of the same kind, so the compiler's guards hold for all of them."""
    counter = CompileCounterWithBackend("inductor")
    torch._dynamo.reset()
    module, plain = layer("encoder").float(), layer("encoder").float()
    stash, other = WeightStash(module, 4), WeightStash(plain, 4)
    one, two = npp.NAdam(module.parameters(), stash=stash), npp.NAdam(plain.parameters(), stash=other)
    compiled = torch.compile(module, backend=counter)
    for t in range(9):
        losses = []
        for call, ring, optimizer in ((compiled, stash, one), (plain, other, two)):
            with ring.use(ring.newest):
                loss = objective(call(data(t).float()))
            loss.backward()
            optimizer.step(version=ring.newest)
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
