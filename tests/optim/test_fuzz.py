"""Random optimizers over strange tensors: torch's result, or an error and nothing changed; never a crash.

If torch's own optimizer steps, its result is the reference. It is not run where it would read memory that does not
exist.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from backends import BACKENDS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from strange import DEADLY, GRADIENTS, PARAMETERS, STATES, values
from torch import nn

import nesterov_pp as npp
from nesterov_pp.kernels.raw import has_memory, is_subclass

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
SHAPES = [(), (0,), (1,), (17,), (3, 5), (2, 3, 4, 5)]
STEP = 0.25  # the size of a step; the tolerance of the lowest precision is small against it
EPS = 1e-4  # representable in float16, in which torch computes
CLOSE = {
    torch.float32: {"rtol": 1e-3, "atol": 1e-3},
    torch.complex64: {"rtol": 1e-3, "atol": 1e-3},
    torch.float64: {"rtol": 1e-6, "atol": 1e-6},  # torch's mu_product is float32
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
}


@dataclass(frozen=True)
class Spec:
    """One parameter: its kind and, for each step, its gradient and the change made to its state beforehand."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    kind: str
    grads: tuple[str, ...]
    states: tuple[str, ...]


STEPS = 3


def specs() -> st.SearchStrategy[Spec]:
    often_plain = lambda strange: st.one_of(st.just("plain"), st.sampled_from(sorted(strange)))  # noqa: E731
    return st.builds(
        Spec,
        dtype=st.sampled_from(DTYPES),
        shape=st.sampled_from(SHAPES),
        kind=often_plain(PARAMETERS),
        grads=st.tuples(*[often_plain(GRADIENTS)] * STEPS),
        states=st.tuples(*[st.one_of(st.just("plain"), st.just("plain"), often_plain(STATES))] * STEPS),
    )


def build(cls: Any, extra: dict[str, Any], chosen: list[Spec]) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    ps = [PARAMETERS[spec.kind](values(i, spec.shape, spec.dtype)) for i, spec in enumerate(chosen)]
    return ps, cls(ps, lr=STEP, eps=EPS, **extra)


def prepare(t: int, chosen: list[Spec], ps: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Set gradients and state for step t; a gradient that torch refuses becomes None."""
    for i, (spec, p) in enumerate(zip(chosen, ps, strict=True)):
        make = GRADIENTS[spec.grads[t]]
        try:
            p.grad = make(values(100 * t + i, spec.shape, spec.dtype), p)
        except (RuntimeError, TypeError, NotImplementedError, ValueError):
            p.grad = None
        if p in optimizer.state and "exp_avg" in optimizer.state[p]:
            STATES[spec.states[t]](optimizer.state[p])


def seen(ps: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return everything that a step could change, as far as its memory can be read."""

    def value(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if x.is_meta or not has_memory(x) or is_subclass(x):
            return "unreadable"
        return x.detach().clone().resolve_neg().resolve_conj()

    found: list[Any] = [value(p) for p in ps]
    return found + [{k: value(v) for k, v in optimizer.state[p].items()} if p in optimizer.state else {} for p in ps]


def unchanged(before: Any, after: Any) -> bool:
    if isinstance(before, torch.Tensor):
        return isinstance(after, torch.Tensor) and torch.equal(before.nan_to_num(7.5), after.nan_to_num(7.5))
    if isinstance(before, dict):
        step = before.get("step")
        if isinstance(step, torch.Tensor) and step.numel() == 1 and not step.any():
            return True  # never stepped, so it may follow its parameter
        return all(unchanged(before[k], after.get(k)) for k in before)
    if isinstance(before, list):
        return all(map(unchanged, before, after))
    return before == "unreadable" or bool(before == after)


def attempt(step: Callable[[], Any]) -> BaseException | None:
    try:
        step()
    except Exception as error:
        return error
    return None


def check(chosen: list[Spec], name: str, backend: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check(chosen, name, backend)


def _check(chosen: list[Spec], name: str, backend: str) -> None:
    try:
        ours, optimizer = build(getattr(npp, name), {"backend": backend}, chosen)
    except ValueError:
        return  # refused by the constructor
    theirs, judge = build(getattr(torch.optim, name), {}, chosen)
    for t in range(STEPS):
        prepare(t, chosen, ours, optimizer)
        before = seen(ours, optimizer)
        error = attempt(optimizer.step)
        if error is not None:
            assert isinstance(error, ValueError | RuntimeError), f"{type(error).__name__}: {error}"
            assert str(error)
            assert unchanged(before, seen(ours, optimizer)), f"changed in spite of: {error}"
            return
        if any(spec.kind in DEADLY or DEADLY & {spec.grads[t], *spec.states[: t + 1]} for spec in chosen):
            return  # there is no right result to compare with
        prepare(t, chosen, theirs, judge)
        if attempt(judge.step) is not None:
            return
        for spec, p, q in zip(chosen, ours, theirs, strict=True):
            here, there = (x.detach().clone().resolve_neg().resolve_conj() for x in (p, q))
            torch.testing.assert_close(
                here, there, equal_nan=True, msg=lambda m, s=spec: f"{s}\n{m}", **CLOSE[spec.dtype]
            )


fuzzed = given(
    chosen=st.lists(specs(), min_size=1, max_size=4),
    name=st.sampled_from(["NAdam", "AdamW"]),
    backend=st.sampled_from(["auto", *(b for b in BACKENDS if b not in ("cuda", "triton"))]),
)


quietly = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=[Phase.generate, Phase.shrink],
)


@settings(quietly, max_examples=400, derandomize=True)
@fuzzed
def test_strange_optimizers(chosen, name, backend):
    check(chosen, name, backend)


@pytest.mark.slow
@settings(quietly, max_examples=5000)
@fuzzed
def test_many_strange_optimizers(chosen, name, backend):
    check(chosen, name, backend)
