"""Plain C++ loops with an optimizer's streams: what the memory gives, measured beside the optimizers."""

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
    """The plain loops cannot be compiled here."""


@cache
def library() -> ctypes.CDLL:
    """The loops, compiled for this processor: anew in each process, since the folder may come from another machine.

    Raises:
        NoCompilerError: there is no compiler, or it fails.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    target = BUILD / "plain.so"
    # Moved into place when complete: another process may have the old file loaded.
    unfinished = BUILD / f"plain.{os.getpid()}.so"
    command = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS, str(SOURCE), "-o", str(unfinished)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        raise NoCompilerError(
            f"the plain loops need a C++ compiler, and `{command[0]}` does not run: {error}"
        ) from error
    except subprocess.CalledProcessError as error:
        raise NoCompilerError(f"`{shlex.join(command)}` fails: {error.stderr.strip()}") from error
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
    """One pass over four lists of float32 tensors (p, g, m, v), of which all but g are written too."""
    call, sizes = library().seven_streams, _sizes(lists[0])
    pointers = [_pointers(tensors) for tensors in lists]

    def run(_kept: object = lists) -> None:  # the pointers are good for as long as the tensors live
        call(*pointers, sizes, ctypes.c_int64(len(sizes)), ctypes.c_int(torch.get_num_threads()))

    return run


def read_once(tensors: Sequence[Tensor]) -> Callable[[], float]:
    """One pass that reads a list of float32 tensors; returns the sum of their squares."""
    call, sizes, pointers = library().sum_of_squares, _sizes(tensors), _pointers(tensors)

    def run(_kept: object = tensors) -> float:
        return float(call(pointers, sizes, ctypes.c_int64(len(sizes)), ctypes.c_int(torch.get_num_threads())))

    return run
