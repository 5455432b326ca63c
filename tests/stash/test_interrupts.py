"""A step that is cut short by Ctrl-C or an error never leaves a ring between two versions."""

from __future__ import annotations

import copy
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import BACKENDS
from interrupted import Interrupted
from layers import data, layer, objective
from torch import nn

import nesterov_pp as npp
from nesterov_pp import WeightStash
from nesterov_pp.optim.wrapped import StepsCopies


def ring(frozen: bool = False) -> tuple[nn.Module, WeightStash, npp.NAdam]:
    """Make a ring of three versions with gradients and microbatches in flight on two; the next step takes version 1."""
    module = layer("linear")
    stash = WeightStash(module, 3)
    optimizer = npp.NAdam(module.parameters(), lr=0.1, stash=stash)
    for v in range(2):
        with stash.use(v):
            objective(module(data(v))).backward()
        optimizer.step(version=v)
    for v in (1, 2):
        with stash.use(v):
            objective(module(data(v))).backward()
    if frozen:
        next(module.parameters()).requires_grad_(False)
    return module, stash, optimizer


def everything(module: nn.Module, stash: WeightStash) -> dict[str, Any]:
    slots = [[leaf.detach() for leaf in slot] for slot in stash._slots]
    return {
        "position": (stash.newest, stash.oldest, [stash.in_flight(v) for v in range(6)]),
        "slots": slots,
        "gradients": [[None if leaf.grad is None else leaf.grad for leaf in slot] for slot in stash._slots],
        "trains": [[leaf.requires_grad for leaf in slot] for slot in stash._slots],
        "bound": [
            [(s, i) for s, slot in enumerate(stash._slots) for i, leaf in enumerate(slot) if leaf is p]
            for p in module.parameters()
        ],
    }


def passed(stash: WeightStash, optimizer: npp.NAdam) -> tuple[int, int]:
    """Step up to the end of the pass, without ``end_step``; return the arguments of ``end_step``."""
    finished = stash.end_step
    stash.end_step = lambda *_: None  # type: ignore[method-assign]
    optimizer.step(version=1)
    stash.end_step = finished  # type: ignore[method-assign]
    return 1, 1


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("again", ["the same call", "what comes next"])
def test_a_step_that_is_cut_short_anywhere(frozen: bool, again: str) -> None:
    """Interrupt each line of ``end_step``; the same call finishes it or, once counted, the ring's next use does."""
    module, stash, optimizer = ring(frozen)
    stash.end_step(*passed(stash, optimizer))
    expected = everything(module, stash)
    stash.end_step(1, 1)
    torch.testing.assert_close(everything(module, stash), expected, rtol=0, atol=0)
    lines = 0
    while True:
        module, stash, optimizer = ring(frozen)
        step = passed(stash, optimizer)
        before = everything(module, stash)
        try:
            with Interrupted(lines) as interrupted:
                stash.end_step(*step)
        except KeyboardInterrupt:
            pass
        if stash.newest == 2 and interrupted.raised:
            for name in ("position", "gradients", "bound"):
                torch.testing.assert_close(everything(module, stash)[name], before[name], rtol=0, atol=0)
        if again == "the same call" or stash.newest == 2:
            stash.end_step(*step)
        with torch.no_grad(), stash.use(stash.newest):
            torch.testing.assert_close(everything(module, stash), expected, rtol=0, atol=0)
        torch.testing.assert_close(everything(module, stash), expected, rtol=0, atol=0)
        if not interrupted.raised:
            break
        lines += 1
    assert lines > 20


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from a finalizer that is cut short
def test_a_block_that_is_cut_short_anywhere_binds_nothing() -> None:
    """Interrupt every line of ``use``, before and after its block."""
    lines = cut = 0
    while True:
        module, stash, optimizer = ring()
        try:
            with Interrupted(lines) as interrupted, stash.use(1):
                sys.settrace(None)
                module(data(0))
                sys.settrace(interrupted._trace)
        except KeyboardInterrupt:
            cut += 1
        sys.settrace(None)
        counted = stash.in_flight(1)
        assert counted in (1, 2), "one is in flight from before; that of the block is counted or not"
        optimizer.step(version=1, microbatches=counted)
        assert stash.newest == 3
        assert stash.in_use == 3
        assert all(p is q for p, q in zip(module.parameters(), stash.parameters(3).values(), strict=True))
        if not interrupted.raised:
            break
        lines += 1
    assert cut > 20


@pytest.mark.parametrize("base", ["muon", "basis-rotation"])
def test_copies_that_are_stepped_are_written_to_the_ring_whatever_happens(base: str) -> None:
    """Ctrl-C in any part of a multi-part step acts as if it had come just before or just after the step."""

    def build() -> tuple[nn.Module, WeightStash, StepsCopies]:
        module = layer("encoder")
        stash = WeightStash(module, 2, shadow="stepped")
        optimizer = StepsCopies(module.parameters(), lr=0.01, stash=stash, base=base)
        for group in optimizer.param_groups:
            group["horizon"] = 1.0
        return module, stash, optimizer

    def run(cut: int) -> tuple[list[Any], bool]:
        module, stash, optimizer = build()
        calls = [0]
        raised = False

        def interrupting(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **options: Any) -> Any:
                result = function(*args, **options)
                calls[0] += 1
                if calls[0] == cut:
                    signal.raise_signal(signal.SIGINT)
                return result

            return wrapped

        for inner in optimizer._inner:
            inner.step = interrupting(inner.step)  # type: ignore[method-assign]
        stash.end_step = interrupting(stash.end_step)  # type: ignore[method-assign]
        stash.leaves = interrupting(stash.leaves)  # type: ignore[method-assign]
        for m in range(4):
            while stash.newest == m:
                stash.zero_grad()
                with stash.use(m):
                    objective(module(data(m))).backward()
                try:
                    optimizer.step(version=m)
                except KeyboardInterrupt:
                    raised = True
                if stash.newest == m:
                    stash.release(m)
        weights = [[p.detach() for p in stash.parameters(v).values()] for v in (3, 4)]
        return [*weights, [p.detach() for p in stash.weights().values()]], raised

    expected, raised = run(0)
    assert not raised
    cut = 1
    while True:
        found, raised = run(cut)
        if not raised:
            break
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        cut += 1
    assert cut > 8


def test_an_optimizer_of_torch_that_fails_half_way_is_not_gone_on_with() -> None:
    module = layer("encoder")
    stash = WeightStash(module, 2, shadow="stepped")
    optimizer = StepsCopies(module.parameters(), lr=0.01, stash=stash, base="muon")
    saved, ring_saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(stash.state_dict())

    def fails() -> None:
        raise torch.OutOfMemoryError

    step = optimizer._inner[1].step
    optimizer._inner[1].step = fails  # type: ignore[method-assign]
    with stash.use(0):
        objective(module(data(0))).backward()
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    optimizer._inner[1].step = step  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"an earlier step failed half way.*load the states of the stash and of its"):
        optimizer.step()
    assert stash.newest == 0
    stash.load_state_dict(ring_saved)
    optimizer.load_state_dict(saved)
    with stash.use(0):
        objective(module(data(0))).backward()
    optimizer.step()
    assert stash.newest == 1


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("cpu", "reference")])
def test_a_step_that_is_cut_short_after_its_pass_is_counted(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens between the pass and the end of the step, weights, moments, counts and version stay in step."""
    results = []
    for cut in (False, True):
        module = layer("linear")
        stash = WeightStash(module, 2)
        optimizer = npp.NAdam(module.parameters(), lr=0.1, stash=stash, backend=backend)
        for t in range(6):
            with stash.use(t):
                objective(module(data(t))).backward()
            with monkeypatch.context() as patch:
                if cut and t == 3:
                    patch.setattr(type(optimizer._prepared), "written", interrupt)
                    with pytest.raises(KeyboardInterrupt):
                        optimizer.step(version=t)
                else:
                    optimizer.step(version=t)
            assert stash.newest == t + 1
            assert {float(entry["step"]) for entry in optimizer.state.values()} == {t + 1.0}
        results.append(everything(module, stash))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


LOOP = """
import sys, torch, nesterov_pp as npp
torch.set_num_threads(1)
module = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(40)))
stash = npp.WeightStash(module, 2)
optimizer = npp.NAdam(module.parameters(), stash=stash)
print("ready", flush=True)
interrupts = 0
while interrupts < 12:
    try:
        while True:
            version = stash.newest
            with stash.use(version):
                module(torch.ones(2, 4)).sum().backward()
            optimizer.step(version=version)
    except KeyboardInterrupt:
        interrupts += 1
        for v in range(stash.oldest, stash.newest + 1):
            while stash.in_flight(v):
                stash.release(v)
        stash.zero_grad()
    with torch.no_grad(), stash.use(stash.newest):
        pass
    assert {float(entry["step"]) for entry in optimizer.state.values()} == {float(stash.newest)}
    assert all(p is q for p, q in zip(module.parameters(), stash.parameters(stash.newest).values()))
    assert all(leaf.grad is None for slot in stash._slots for leaf in slot)
    print(stash.newest, flush=True)
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_process_that_is_interrupted_again_and_again() -> None:
    process = subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    reader = threading.Thread(target=lambda: [lines.put(line) for line in process.stdout or []], daemon=True)
    try:
        assert process.stdout.readline() == "ready\n"
        reader.start()
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.037)
            process.send_signal(signal.SIGINT)
            try:
                if lines.get(timeout=1) == "done\n":
                    break
            except queue.Empty:
                continue  # this interrupt came while Python ran a finalizer, which drops it
        process.wait(30)
    finally:
        process.kill()
        reader.join(30)
        errors = process.stderr.read() if process.stderr is not None else ""
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    assert process.wait() in (0, -signal.SIGINT), errors
    assert "AssertionError" not in errors, errors
