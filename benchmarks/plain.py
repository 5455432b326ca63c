"""Plain C++ loops with an optimizer's streams: the memory bandwidth, measured along with the optimizers."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("plain.cpp")
BUILD = Path(__file__).resolve().parents[1] / "build" / "benchmarks"
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wall", "-Wextra"]


class NoCompilerError(RuntimeError):
    """The error raised if the plain loops cannot be compiled here."""


@cache
def library() -> ctypes.CDLL:
    """Compile the loops for this processor, once in each process, since the folder may come from another machine.

    Raises:
        NoCompilerError: there is no compiler, or the compiler fails.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    target = BUILD / "plain.so"
    # Moved into place when complete, since another process may have the old file loaded.
    unfinished = BUILD / f"plain.{os.getpid()}.so"
    command = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS, str(SOURCE), "-o", str(unfinished)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        raise NoCompilerError(
            f"the plain loops need a C++ compiler, but `{command[0]}` cannot be run: {error}"
        ) from error
    except subprocess.CalledProcessError as error:
        raise NoCompilerError(f"`{shlex.join(command)}` failed: {error.stderr.strip()}") from error
    unfinished.replace(target)
    found = ctypes.CDLL(str(target))
    found.sum_of_squares.restype = ctypes.c_double
    return found


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    if not all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors):
        raise ValueError("the plain loops take contiguous float32 tensors")
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def _sizes(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(tensors))(*[t.numel() for t in tensors])


def seven_streams(lists: Sequence[Sequence[Tensor]]) -> Callable[[], None]:
    """Return a pass that reads four lists of float32 tensors (p, g, m, v) and writes all but g."""
    call, sizes = library().seven_streams, _sizes(lists[0])
    pointers = [_pointers(tensors) for tensors in lists]

    def run(_kept: object = lists) -> None:  # keeps the tensors alive, and so the pointers valid
        call(*pointers, sizes, ctypes.c_int64(len(sizes)), ctypes.c_int(torch.get_num_threads()))

    return run


def read_once(tensors: Sequence[Tensor]) -> Callable[[], float]:
    """Return a pass that reads a list of float32 tensors and returns the sum of their squares."""
    call, sizes, pointers = library().sum_of_squares, _sizes(tensors), _pointers(tensors)

    def run(_kept: object = tensors) -> float:
        return float(call(pointers, sizes, ctypes.c_int64(len(sizes)), ctypes.c_int(torch.get_num_threads())))

    return run
