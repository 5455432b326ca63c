"""Activation checkpointing inside a stage: recomputation in backward uses the weights of its forward."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from layers import data, objective
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import nesterov_pp as npp
from nesterov_pp import WeightStash
from nesterov_pp.pipeline import VirtualPipeline, recipes

REENTRANT: list[bool | None] = [None, False, True]
"""How blocks are checkpointed: None for not at all, otherwise the value of ``use_reentrant``."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, which is enough for tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Stage(nn.Module):
    """Three checkpointed blocks and a checkpointed function that reads its weight from the module."""

    def __init__(self, reentrant: bool | None, *, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 8)) for _ in range(blocks)
        )
        self.gain = nn.Parameter(torch.randn(8, 8))
        self.reentrant = reentrant
        self.double()

    def again(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None or not torch.is_grad_enabled():
            return function(x)
        return checkpoint(function, x, use_reentrant=self.reentrant)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(self.blocks[0], x)
        x = self.again(lambda y: F.linear(y, self.gain).tanh(), x)
        for block in self.blocks[1:]:
            x = x + self.again(block, x)
        return x


def ring(reentrant: bool | None, versions: int, lr: float = 0.05) -> tuple[Stage, WeightStash, npp.NAdam]:
    stage = Stage(reentrant)
    stash = WeightStash(stage, versions)
    return stage, stash, npp.NAdam(stage.parameters(), lr=lr, stash=stash)


def train(reentrant: bool | None, tau: int, updates: int, backward: Callable[..., Any] | None = None) -> list[Any]:
    """Run the README's loop; return the losses and input gradients of all microbatches, then the weights."""
    stage, stash, optimizer = ring(reentrant, tau + 1)
    in_flight, found = [], []
    for m in range(updates + tau):
        x = data(m).requires_grad_()
        with stash.use(stash.newest):
            loss = objective(stage(x))
        in_flight.append((stash.newest, loss, x))
        if len(in_flight) > tau:
            version, loss, x = in_flight.pop(0)
            if backward is None:
                loss.backward()
            else:
                backward(stash, version, loss)
            optimizer.step(version=version)
            found += [loss.detach(), x.grad]
    return [*found, *(p.detach() for p in stage.parameters())]


def inside_use(stash: WeightStash, version: int, loss: torch.Tensor) -> None:
    with stash.use(version):
        loss.backward()


@pytest.mark.parametrize("backward", [None, inside_use], ids=["as-it-comes", "inside-use"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("tau", [0, 1, 3])
def test_training_is_that_without_checkpointing(reentrant: bool, tau: int, backward: Any) -> None:
    torch.testing.assert_close(train(reentrant, tau, 60, backward), train(None, tau, 60), rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_a_virtual_pipeline_of_checkpointed_stages(reentrant: bool, recompute: bool) -> None:
    def run(how: bool | None, recompute: bool) -> list[Any]:
        pipe = VirtualPipeline([Stage(how, blocks=1) for _ in range(4)], F.mse_loss, lr=0.01, recompute=recompute)
        losses = [pipe.step(data(m).requires_grad_(), data(m + 100)) for m in range(60)]
        return losses + [p.detach() for stage in pipe.stages for p in stage.parameters()]

    torch.testing.assert_close(run(reentrant, recompute), run(None, False), rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_one_backward_through_several_versions(reentrant: bool) -> None:
    """Run one backward through forwards of three versions, both independent ones and ones feeding each other."""

    def gradients(how: bool | None) -> list[Any]:
        stage, stash, optimizer = ring(how, 3, lr=0.5)
        losses, x = [], data(0).requires_grad_()
        for v in range(3):
            with stash.use(v):
                y = stage(data(v).requires_grad_())
                losses.append(objective(y))
            if v < 2:
                for leaf in stash.parameters(v).values():
                    leaf.grad = torch.ones_like(leaf)
                optimizer.step(version=v)
        with stash.use(1):
            y = stage(x)
        with stash.use(0):
            y = stage(y)
        with stash.use(2):
            losses.append(objective(stage(y)))
        sum(losses).backward()
        assert stash.in_use == stash.newest
        assert all(p is q for p, q in zip(stage.parameters(), stash.parameters(2).values(), strict=True))
        return [x.grad, *(leaf.grad for v in range(3) for leaf in stash.parameters(v).values())]

    torch.testing.assert_close(gradients(reentrant), gradients(None), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_what_passes_through_a_forward_keeps_its_version(reentrant: bool) -> None:
    """If a stage passes its input on, the node of that input belongs to the forward before it."""

    class Passing(Stage):
        def forward(self, x: torch.Tensor) -> Any:
            return x, super().forward(x)

    def gradients(how: bool | None) -> list[Any]:
        stage = Passing(how)
        stash = WeightStash(stage, 2)
        optimizer = npp.NAdam(stage.parameters(), lr=0.5, stash=stash)
        x = data(0).requires_grad_()
        with stash.use(0):
            _, y = stage(x)
        for leaf in stash.parameters(0).values():
            leaf.grad = torch.ones_like(leaf)
        optimizer.step(version=0)
        with stash.use(1):
            kept, y = stage(y)
        objective(kept * y).backward()
        return [x.grad, *(leaf.grad for v in range(2) for leaf in stash.parameters(v).values())]

    torch.testing.assert_close(gradients(reentrant), gradients(None), rtol=1e-12, atol=1e-12)


def stepped(stash: WeightStash, optimizer: npp.NAdam) -> None:
    for leaf in stash.parameters(stash.newest).values():
        leaf.grad = torch.ones_like(leaf)
    optimizer.step(version=stash.newest)


def bound_to_the_newest(stage: nn.Module, stash: WeightStash) -> bool:
    newest = stash.parameters(stash.newest).values()
    return stash.in_use == stash.newest and all(p is q for p, q in zip(stage.parameters(), newest, strict=True))


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_a_backward_inside_a_block_of_another_version_is_refused(reentrant: bool | None) -> None:
    stage, stash, optimizer = ring(reentrant, 3)
    with stash.use(0):
        loss = objective(stage(data(0).requires_grad_()))
    stepped(stash, optimizer)
    with (
        stash.use(1),
        pytest.raises(RuntimeError, match=r"forward with version 0, but runs inside a block of version 1"),
    ):
        loss.backward()
    assert bound_to_the_newest(stage, stash)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_a_backward_of_weights_that_are_gone_is_refused(reentrant: bool) -> None:
    """Autograd cannot notice this, because it saved nothing that could have changed."""
    stage, stash, optimizer = ring(reentrant, 1)
    loss = objective(stage(data(0).requires_grad_()))
    stepped(stash, optimizer)
    with pytest.raises(RuntimeError, match="version 0, which has left the ring of versions 1 to 1"):
        loss.backward()
    stage, stash, optimizer = ring(reentrant, 2)
    with stash.use(0):
        loss = objective(stage(data(0).requires_grad_()))
    stash.load_state_dict(ring(None, 2)[1].state_dict())
    with pytest.raises(RuntimeError, match="from before the WeightStash was loaded"):
        loss.backward()


def test_a_backward_that_fails_leaves_nothing_bound() -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.append(stash.in_use)
            raise KeyboardInterrupt

    seen: list[int] = []
    stage, stash, optimizer = ring(False, 2)
    with stash.use(0):
        loss = objective(stage(Failing.apply(data(0).requires_grad_())))
    stepped(stash, optimizer)
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    assert seen == [0]
    assert bound_to_the_newest(stage, stash)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_parts_that_run_by_themselves(reentrant: bool) -> None:
    """Blocks called one by one are bound too, but inside reentrant checkpoints their version cannot be known."""

    def loss_of(how: bool | None) -> tuple[Stage, WeightStash, torch.Tensor, torch.Tensor]:
        stage, stash, optimizer = ring(how, 3, lr=0.5)
        x = data(0).requires_grad_()
        with stash.use(0):
            y = stage.again(stage.blocks[0], x)
            loss = objective(stage.again(stage.blocks[1], y))
        assert stash.in_flight(0) == 1
        stepped(stash, optimizer)
        return stage, stash, x, loss

    _, other, x, loss = loss_of(None)
    loss.backward()
    expected = [x.grad, *(leaf.grad for leaf in other.parameters(0).values())]
    stage, stash, x, loss = loss_of(reentrant)
    if reentrant:
        with pytest.raises(
            RuntimeError, match=r"the version to run it with is not known; run this backward inside `with stash.use"
        ):
            loss.backward(retain_graph=True)
        assert bound_to_the_newest(stage, stash)
        with stash.use(0):
            loss.backward()
    else:
        loss.backward()
    got = [x.grad, *(leaf.grad for leaf in stash.parameters(0).values())]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_a_backward_that_is_not_stashed_refuses_to_run_again(reentrant: bool) -> None:
    stage, stash, optimizer = ring(reentrant, 3)
    with stash.use(0, linearise_at="newest"):
        objective(stage(data(0).requires_grad_())).backward()  # the newest version is that of the forward
    with stash.use(0, linearise_at="newest"):
        loss = objective(stage(data(0).requires_grad_()))
    optimizer.step(version=0, microbatches=2)
    with pytest.raises(RuntimeError, match="linearise_at='newest' needs the activations of version 0"):
        loss.backward()
    shadowed = WeightStash(Stage(reentrant), 2, shadow="linearised")
    with shadowed.use(0, linearise_at="shadow"):
        loss = objective(shadowed._bound._places._module(data(0).requires_grad_()))
    with pytest.raises(RuntimeError, match="linearise_at='shadow' needs the activations"):
        loss.backward()


@pytest.mark.parametrize("method", [name for name, recipe in recipes().items() if recipe.linearise_at != "version"])
def test_methods_that_are_not_stashed_refuse_checkpointed_stages(method: str) -> None:
    pipe = VirtualPipeline([Stage(False, blocks=1) for _ in range(3)], F.mse_loss, method, lr=0.01)
    steps = (pipe.step(data(m).requires_grad_(), data(m + 100)) for m in range(20))
    with pytest.raises(RuntimeError, match="runs again in a backward"):
        list(steps)


def test_only_forwards_are_microbatches_in_flight() -> None:
    stage, stash, optimizer = ring(None, 2)
    counts = []
    with stash.use(0):
        pass
    counts.append(stash.in_flight(0))
    with stash.use(0):
        one, two = objective(stage(data(0))), objective(stage(data(1)))
        counts.append(stash.in_flight(0))
        one.backward()
    counts.append(stash.in_flight(0))
    with stash.use(0):
        two.backward()
    counts.append(stash.in_flight(0))
    with stash.use(0), torch.no_grad():
        stage(data(0))
    counts.append(stash.in_flight(0))
    with stash.use(0):
        F.linear(data(0), stage.gain)  # called directly, so that no hook of the module sees it
        with stash.use(0), torch.no_grad():
            stage(data(0))
    counts.append(stash.in_flight(0))
    assert counts == [0, 1, 1, 1, 1, 2]
    optimizer.step(version=0, microbatches=2)
    with stash.use(0), stash.use(1):
        loss = objective(stage(data(0)))
    with stash.use(1):
        loss.backward()
        optimizer.step(version=1)  # a step is allowed inside the block of its backward
    assert [stash.in_flight(v) for v in range(3)] == [0, 0, 0]
    assert bound_to_the_newest(stage, stash)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointed", [None, False], ids=["", "checkpointed"])
def test_compiled_whole(fresh_compiler: None, checkpointed: bool | None) -> None:
    """The hooks cause no graph breaks; forwards are counted, backwards are not, and gradients are right."""

    def gradients(how: bool | None, compiled: bool) -> list[Any]:
        stage, stash, optimizer = ring(how, 3, lr=0.5)
        call = torch.compile(stage, backend="aot_eager", fullgraph=True) if compiled else stage
        x = data(0).requires_grad_()
        with torch.no_grad(), stash.use(0):
            call(x)
        assert stash.in_flight(0) == 0
        with stash.use(0):
            loss = objective(call(x))
        assert stash.in_flight(0) == 1
        stepped(stash, optimizer)
        with stash.use(0):
            loss.backward()
        return [x.grad, *(leaf.grad for leaf in stash.parameters(0).values())]

    torch.testing.assert_close(gradients(checkpointed, True), gradients(None, False), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 compiles parts of its checkpoints, too")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo reads it
def test_compiled_blocks_in_eager_checkpoints(fresh_compiler: None) -> None:
    """The recomputed blocks are compiled and use the weights that the eager stage around them has bound."""
    stage, stash, optimizer = ring(False, 3, lr=0.5)
    plain, other, twin = ring(None, 3, lr=0.5)
    for block in stage.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    found = []
    for module, own, steps in ((stage, stash, optimizer), (plain, other, twin)):
        x = data(0).requires_grad_()
        with own.use(0):
            loss = objective(module(x))
        stepped(own, steps)
        loss.backward()
        found.append([x.grad, *(leaf.grad for leaf in own.parameters(0).values())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_module_is_an_ordinary_module(copied: Callable[[nn.Module], nn.Module]) -> None:
    stage, stash, optimizer = ring(False, 2)
    with stash.use(0):
        loss = objective(stage(data(0).requires_grad_()))
    other = copied(stage)
    stepped(stash, optimizer)
    again = objective(other(data(0).requires_grad_()))
    assert stash.in_flight(0) == 0
    again.backward()
    loss.backward()
    got = [p.grad for p in other.parameters()]
    torch.testing.assert_close(got, [leaf.grad for leaf in stash.parameters(0).values()], rtol=0, atol=0)
    WeightStash(other, 2)


def test_a_module_without_its_ring_has_no_hooks() -> None:
    stage = Stage(None)
    stash = WeightStash(stage, 2)
    assert stage._forward_hooks
    del stash
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in stage.modules())
