"""Plain C++ loops with an optimizer's streams: what the memory gives, measured beside the optimizers."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("plain.cpp")
BUILD = Path(__file__).resolve().parents[1] / "build" / "benchmarks"


@cache
def library() -> ctypes.CDLL:
    """The loops, compiled for this processor.

    Raises:
        RuntimeError: there is no compiler, or it fails.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise RuntimeError("the plain loops need a C++ compiler; install g++, or name one in CXX")
    BUILD.mkdir(parents=True, exist_ok=True)
    target = BUILD / "plain.so"
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wall", "-Wextra"]
    done = subprocess.run([compiler, *flags, str(SOURCE), "-o", str(target)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{compiler} cannot compile {SOURCE}: {done.stderr}")
    return ctypes.CDLL(str(target))


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def _offsets(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_size_t]:
    first = [0]
    for t in tensors:
        first.append(first[-1] + t.numel())
    return (ctypes.c_size_t * len(first))(*first)


def seven_streams(lists: Sequence[Sequence[Tensor]]) -> Callable[[], None]:
    """One pass over four lists of float32 tensors (p, g, m, v), of which all but g are written too."""
    call, first = library().seven_streams, _offsets(lists[0])
    pointers = [_pointers(tensors) for tensors in lists]
    return lambda: call(*pointers, first, ctypes.c_size_t(len(lists[0])), torch.get_num_threads())


def read_once(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """One pass that reads a list of float32 tensors."""
    call, first, pointers = library().sum_of_squares, _offsets(tensors), _pointers(tensors)
    return lambda: call(pointers, first, ctypes.c_size_t(len(tensors)), torch.get_num_threads())
