"""Steps counted on the device, and captured in graphs if there is a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import nesterov_pp as npp
from nesterov_pp.optim import GapAware
from tests.device.devices import BACKENDS, DEVICE, GPU, SMALL, needs, skip_without_any, values
from tests.tolerances import MANY_STEPS

skip_without_any()
CLOSE = MANY_STEPS[torch.float32]
RULES = [npp.NAdam, npp.AdamW, npp.NAG, npp.Lion]


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    needs(request.param)
    return request.param


def made(kind: Any, backend: str, *, capturable: bool, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    ps = [nn.Parameter(w.to(DEVICE)) for w in values(dtype, SMALL)]
    groups = [{"params": ps[:4]}, {"params": ps[4:], "lr": 3e-3, "weight_decay": 0.1}]
    return ps, kind(groups, lr=1e-2, backend=backend, capturable=capturable, **options)


def give_gradients(ps: list[nn.Parameter], step: int, missing: set[tuple[int, int]] = frozenset()) -> None:  # type: ignore[assignment]
    for i, (p, g) in enumerate(zip(ps, values(p_dtype(ps), SMALL, seed=step + 1), strict=True)):
        p.grad = None if (i, step) in missing else g.to(DEVICE)


def p_dtype(ps: list[nn.Parameter]) -> torch.dtype:
    return ps[0].dtype


def assert_same(ours: list[nn.Parameter], theirs: list[nn.Parameter], a: Any, b: Any, close: dict[str, float]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, **close)
        for name, value in b.state[q].items():
            torch.testing.assert_close(a.state[p][name].cpu(), value.cpu(), **close, check_dtype=False)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 1.0},
        {"maximize": True},
        {"dtype": torch.bfloat16, "master_weights": True},
        {"dtype": torch.bfloat16, "master_weights": "24bit", "state_dtype": "8bit"},
    ],
    ids=str,
)
def test_counting_on_the_device_changes_nothing(kind, options, backend):
    ours, counted = made(kind, backend, capturable=True, **options)
    theirs, judge = made(kind, backend, capturable=False, **options)
    missing = {(2, 0), (5, 1), (7, 2), (4, 0), (4, 1)}
    for step in range(5):
        for ps, optimizer in ((ours, counted), (theirs, judge)):
            give_gradients(ps, step, missing)
            optimizer.step()
    low = {"rtol": 2**-7, "atol": 2**-7}
    assert_same(ours, theirs, counted, judge, CLOSE if "dtype" not in options else low)
    for p in ours:
        assert counted.state[p]["step"].device == p.device
    assert [float(counted.state[p]["step"]) for p in ours] == [5, 5, 4, 5, 3, 4, 5, 4]


def test_a_learning_rate_on_the_device_is_followed(backend):
    ours, counted = made(npp.NAdam, backend, capturable=True)
    theirs, judge = made(npp.NAdam, backend, capturable=False)
    rate = torch.tensor(1e-2, device=DEVICE)
    for group in counted.param_groups:
        group["lr"] = rate
    for step in range(4):
        rate.fill_(1e-2 / (step + 1))
        for group in judge.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        for ps, optimizer in ((ours, counted), (theirs, judge)):
            give_gradients(ps, step)
            optimizer.step()
    assert_same(ours, theirs, counted, judge, CLOSE)


@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("kind", RULES)
def test_an_overflow_that_only_the_device_knows_of_changes_nothing(kind, limit, backend):
    ps, optimizer = made(kind, backend, capturable=True, max_grad_norm=limit)
    give_gradients(ps, 0)
    optimizer.step()
    before, state = [p.detach().clone() for p in ps], copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.grad_scale = torch.full((), 1024.0, device=DEVICE)
    optimizer.found_inf = torch.full((), 1.0, device=DEVICE)
    give_gradients(ps, 1)
    ps[3].grad[0] = float("inf")
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, before, strict=True))
    for i, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[i][name]) for name, value in entry.items())
    optimizer.found_inf.zero_()
    give_gradients(ps, 1)
    for p in ps:
        p.grad *= 1024.0
    optimizer.step()
    unscaled, judge = made(kind, backend, capturable=False, max_grad_norm=limit)
    for step in range(2):
        give_gradients(unscaled, step)
        judge.step()
    assert_same(ps, unscaled, optimizer, judge, CLOSE)


def test_a_ring(backend):
    results = []
    for capturable in (True, False):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(7, 33), nn.LayerNorm(33), nn.Linear(33, 5)).to(DEVICE)
        stash = npp.WeightStash(module, versions=3)
        optimizer = npp.NAdam(module.parameters(), backend=backend, stash=stash, capturable=capturable)
        for step in range(7):
            version = max(stash.oldest, stash.newest - step % 2)
            for i, leaf in enumerate(stash.parameters(version).values()):
                leaf.grad = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(step * 10 + i)).to(DEVICE)
            optimizer.step(version=version)
        results.append(
            [p.detach() for v in range(stash.oldest, stash.newest + 1) for p in stash.parameters(v).values()]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("capturable", [True, False])
def test_state_goes_from_one_way_of_counting_to_the_other(capturable, backend):
    ps, first = made(npp.NAdam, backend, capturable=not capturable)
    give_gradients(ps, 0)
    first.step()
    others, second = made(npp.NAdam, backend, capturable=capturable)
    with torch.no_grad():
        for p, q in zip(ps, others, strict=True):
            q.copy_(p)
    saved = copy.deepcopy(first.state_dict())
    for group in saved["param_groups"]:
        group["capturable"] = capturable
    second.load_state_dict(saved)
    for step in (1, 2):
        for parameters, optimizer in ((ps, first), (others, second)):
            give_gradients(parameters, step)
            optimizer.step()
    assert_same(others, ps, second, first, CLOSE)
    for group in second.param_groups:
        group["capturable"] = not capturable
    give_gradients(ps, 3)
    give_gradients(others, 3)
    first.step()
    second.step()
    assert_same(others, ps, second, first, CLOSE)


def test_what_cannot_be_captured_is_refused_and_nothing_is_written(backend):
    ps, optimizer = made(npp.NAdam, backend, capturable=True)
    give_gradients(ps, 0)
    before = [p.detach().clone() for p in ps]
    optimizer.param_groups[1]["capturable"] = False
    with pytest.raises(ValueError, match="capturable must be the same in all parameter groups"):
        optimizer.step()
    optimizer.param_groups[1]["capturable"] = True
    optimizer.param_groups[1]["lr"] = float("nan")
    with pytest.raises(ValueError, match="parameter group 1 cannot be stepped with lr=nan"):
        optimizer.step()
    raising = npp.NAdam(ps, backend=backend, capturable=True, on_nonfinite="raise")
    with pytest.raises(ValueError, match="on_nonfinite='raise' cannot be used with capturable=True"):
        raising.step()
    scheduled = npp.NAG(ps, lr=0.1, momentum=npp.optim.nag.convex_schedule, backend=backend, capturable=True)
    with pytest.raises(ValueError, match="with capturable=True, pass momentum as a number"):
        scheduled.step()
    reference = npp.NAdam(ps, backend="reference", capturable=True)
    with pytest.raises((RuntimeError, AssertionError), match="capturable=True"):
        reference.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, before, strict=True))
    assert {float(s["step"]) for s in optimizer.state.values()} == {0.0}


def test_a_launch_that_fails_is_not_counted(backend, monkeypatch):
    ps, optimizer = made(npp.NAdam, backend, capturable=True)
    give_gradients(ps, 0)
    optimizer.step()
    before, state = [p.detach().clone() for p in ps], copy.deepcopy(optimizer.state_dict()["state"])

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(plan, name)

        def apply_rows(self, rows: torch.Tensor) -> None:
            raise RuntimeError("no launch")

    plan = optimizer._prepared.plan
    monkeypatch.setattr(optimizer._prepared, "plan", Failing())
    with pytest.raises(RuntimeError, match="no launch"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, before, strict=True))
    for i, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[i][name]) for name, value in entry.items())


def test_steps_that_are_captured_have_tables_of_their_own(monkeypatch):
    """Capture more steps than memory was pinned for; the interpreter runs them at once, between other steps."""
    needs("triton")
    if GPU:
        pytest.skip("a GPU captures graphs, which the next tests replay")
    ours, optimizer = made(npp.NAdam, "triton", capturable=True, max_grad_norm=1.0)
    theirs, judge = made(npp.NAdam, "triton", capturable=False, max_grad_norm=1.0)
    kept, stays = [], None
    for step, captured in enumerate([False, True, True, False, True, False]):
        for ps in (ours, theirs):
            give_gradients(ps, step)
            kept.extend(p.grad for p in ps)  # so that the next gradients are at other addresses
        before = None if stays is None else stays.clone()
        with monkeypatch.context() as capturing:
            capturing.setattr(torch.cuda, "is_initialized", lambda: True)
            capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda captured=captured: captured)
            optimizer.step()
        judge.step()
        table = optimizer._prepared.plan._plan.launches()[0].table
        if captured:
            assert torch.equal(stays, before)
            assert not torch.equal(stays, table)
        else:
            assert stays is None or table.data_ptr() == stays.data_ptr()
            stays = table
    assert_same(ours, theirs, optimizer, judge, CLOSE)


@pytest.mark.parametrize("kind", RULES)
def test_a_step_that_counts_on_the_host_is_not_captured(kind, backend, monkeypatch):
    ps, optimizer = made(kind, backend, capturable=False)
    give_gradients(ps, 0)
    before = [p.detach().clone() for p in ps]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    sentence = f"graph capture of step.. for an instance of {kind.__name__} but param_groups' capturable is False"
    with pytest.raises(RuntimeError, match=sentence):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, before, strict=True))


def network(backend: str, rate: Any, versions: int = 1, **options: Any) -> tuple[nn.Module, Callable[[], None]]:
    """Return a small network and its update, which allocates new gradients; one update per ring slot has been done."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(70, 330), nn.LayerNorm(330), nn.Linear(330, 5)).to(DEVICE)
    stash = npp.WeightStash(module, versions=versions) if versions > 1 else None
    optimizer = npp.NAdam(
        module.parameters(), lr=rate, backend=backend, stash=stash, capturable=True, max_grad_norm=1.0, **options
    )
    inputs = torch.randn(8, 70, device=DEVICE)

    def update() -> None:
        optimizer.zero_grad()
        module(inputs).square().mean().backward()
        optimizer.step()

    with torch.cuda.stream(torch.cuda.Stream() if GPU else None):
        for _ in range(versions):
            update()
    if GPU:
        torch.cuda.synchronize()
    return module, update


def graphs_of(update: Callable[[], None], count: int) -> list[torch.cuda.CUDAGraph]:
    graphs = [torch.cuda.CUDAGraph() for _ in range(count)]
    for graph in graphs:
        with torch.cuda.graph(graph):
            update()
    return graphs


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, **CLOSE)


@pytest.mark.skipif(not GPU, reason="only a GPU captures graphs")
@pytest.mark.parametrize(("versions", "options"), [(1, {}), (3, {}), (3, {"correction": GapAware()})], ids=str)
def test_replays_of_captured_steps_are_steps(versions, options, backend):
    """Replay one graph for every slot of the ring, in turn, with a changing learning rate."""
    rate = torch.tensor(1e-2, device=DEVICE)
    ours, captured = network(backend, rate, versions, **options)
    theirs, update = network(backend, rate, versions, **options)
    graphs = graphs_of(captured, versions)
    for step in range(4 * versions):
        rate.fill_(1e-2 / (step + 1))
        graphs[step % versions].replay()
        update()
    torch.cuda.synchronize()
    assert_same_weights(ours, theirs)


@pytest.mark.skipif(not GPU, reason="only a GPU captures graphs")
def test_replays_in_small_formats_have_the_bits_of_steps(backend):
    """Random codes follow the step that is counted on the device, not the captured one."""
    small = {"dtype": torch.bfloat16, "state_dtype": "8bit", "master_weights": "24bit"}
    ours, captured = made(npp.NAdam, backend, capturable=True, **small)
    theirs, judge = made(npp.NAdam, backend, capturable=True, **small)
    with torch.cuda.stream(torch.cuda.Stream()):
        for ps, optimizer in ((ours, captured), (theirs, judge)):
            give_gradients(ps, 0)
            optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        graph.replay()
        judge.step()
    torch.cuda.synchronize()
    assert_same(ours, theirs, captured, judge, {"rtol": 0.0, "atol": 0.0})


@pytest.mark.skipif(not GPU, reason="only a GPU captures graphs")
def test_replays_and_other_steps_do_not_disturb_each_other(backend):
    """The gradients of uncaptured steps and of each graph are at different addresses."""
    ours, captured = network(backend, 1e-2)
    theirs, update = network(backend, 1e-2)
    graphs, kept = graphs_of(captured, 3), []
    for number in (0, None, 1, 0, None, None, 2, 2, None, 1):
        if number is None:
            captured()
            kept.append([p.grad for p in ours.parameters()])  # so that the next ones are at other addresses
        else:
            graphs[number].replay()
        update()
    torch.cuda.synchronize()
    assert_same_weights(ours, theirs)
