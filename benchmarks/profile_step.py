"""Run a few steps under a profiler: ``python -m benchmarks.profile_step --help``.

Put ``nsys profile --capture-range=cudaProfilerApi``, ``ncu --profile-from-start off`` or ``compute-sanitizer`` in
front. Only the measured steps lie between the profiler's start and stop. On a GPU each step is an NVTX range, which
contains ranges for the parts of the step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch

import nesterov_pp as npp
from benchmarks.rows import DEVICE_BACKENDS, WORKLOADS, Ours, Problem
from benchmarks.workloads import prepare

WARM_UP = 3
PLAN_RANGES = {"collect": "gather", "gradient_norm": "norm", "scale": "norm", "apply": "step"}
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": "8bit"}
MASTERS: dict[str, bool | str] = {"no": False, "yes": True, "24bit": "24bit"}
STASH_RANGES = {"begin_step": "ring check", "end_step": "ring advance"}

Range = Callable[[str], AbstractContextManager[Any]]


def no_range(_: str) -> AbstractContextManager[Any]:
    return nullcontext()


def in_range(call: Callable[..., Any], name: str, mark: Range) -> Callable[..., Any]:
    @wraps(call)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with mark(name):
            return call(*args, **kwargs)

    return marked


class Marked:
    """A plan whose calls are ranges; a wrapper, since the compiled plans accept no new attributes."""

    def __init__(self, plan: Any, mark: Range) -> None:
        self._plan, self._mark = plan, mark

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._plan, name)
        return in_range(found, PLAN_RANGES[name], self._mark) if name in PLAN_RANGES else found


def mark_parts(step: Ours, mark: Range) -> None:
    """Put ranges around the parts of the optimizer's step, for as long as its parameters stay the same."""
    prepared: Any = step.optimizer._prepare()
    prepared.plan = Marked(prepared.plan, mark)
    if step.stash is not None:
        for method, name in STASH_RANGES.items():
            setattr(step.stash, method, in_range(getattr(step.stash, method), name, mark))


def backends(asked: str, device: str) -> list[str]:
    """Return the backend asked for, or all backends that have kernels for the device and can be used."""
    if asked != "all":
        return [asked]
    reasons = npp.kernels.available_backends()
    found = [name for name in DEVICE_BACKENDS[device] if name != "reference" and reasons[name] is None]
    return found or ["reference"]


def run(steps: dict[str, Ours], count: int, mark: Range) -> None:
    for name, step in steps.items():
        for _ in range(count):
            prepare(step)
            with mark(f"optimizer.step, {name}"):
                step()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__)
    parser.add_argument(
        "--backend",
        choices=[*npp.kernels.BACKENDS, "all"],
        default="auto",
        help="backend to run, or all with kernels for the device (default: %(default)s)",
    )
    parser.add_argument(
        "--workload", choices=list(WORKLOADS), default="gpt2-small", help="list of tensors (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each backend (default: %(default)s)")
    parser.add_argument(
        "--ring",
        type=int,
        default=0,
        metavar="VERSIONS",
        help="step in a ring of this many versions (default: no ring)",
    )
    parser.add_argument("--clip", type=float, metavar="NORM", help="clip gradients to this norm (default: no clipping)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "float64"],
        default="float32",
        help="dtype of parameters and gradients (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to run on (default: cuda if torch finds a GPU, else cpu)",
    )
    parser.add_argument(
        "--state-dtype",
        choices=list(STATE_DTYPES),
        help="dtype of the moments (default: that of the weights; float32 with masters)",
    )
    parser.add_argument(
        "--master-weights", choices=list(MASTERS), default="no", help="masters of the weights (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("--device cuda needs a GPU, but torch finds none.", file=sys.stderr)
        return 2
    problem = Problem(WORKLOADS[options.workload](), getattr(torch, options.dtype), torch.device(options.device))
    mark: Range = torch.cuda.nvtx.range if on_gpu else no_range
    state, masters = STATE_DTYPES.get(options.state_dtype), MASTERS[options.master_weights]
    kept = {"state_dtype": state, "master_weights": masters, "max_grad_norm": options.clip}
    steps = {}
    for name in backends(options.backend, options.device):
        step = steps[name] = Ours(problem, name, options.ring, **kept)
        mark_parts(step, mark)
    run(steps, WARM_UP, no_range)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    run(steps, options.steps, mark)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]
    for step in steps.values():
        norm = step.optimizer.last_grad_norm
        clipped = "" if norm is None else f", gradients of norm {float(norm):.6g}"
        print(f"{options.steps} steps of {options.workload} by {step.optimizer.backend}{clipped}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
