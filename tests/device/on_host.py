"""The device pass, compiled for the host and run on CPU tensors."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = (
    "row", "grad", "aligned", "numel", "number", "master", "exp_avg", "exp_avg_sq", "mean", "shadow", "exp_avg_scale",
    "exp_avg_sq_scale", "residual",
)  # fmt: skip
ROW, GRAD, ALIGNED, NUMEL, NUMBER, MASTER, EXP_AVG, EXP_AVG_SQ, MEAN, SHADOW = range(10)
EXP_AVG_SCALE, EXP_AVG_SQ_SCALE, RESIDUAL = range(10, 13)
SLOTS = len(COLUMNS)
CODE, SPLIT = "code", "split"  # moments in eight bits, and weights in 24
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, CODE: 4, SPLIT: 5}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SMALL = [
    (F32, F32, CODE),
    (F32, BF16, CODE),
    (F32, F16, CODE),
    (BF16, BF16, CODE),
    (F16, F16, CODE),
    (SPLIT, BF16, F32),
    (SPLIT, BF16, BF16),
    (SPLIT, BF16, CODE),
]
"""The small formats of weights, gradients and moments that have a pass."""
I64, F64 = ctypes.c_int64, ctypes.c_double


@cache
def library(folder: Path) -> ctypes.CDLL:
    """Load ``host.cpp``, compiled into ``folder`` if needed; raise ``FileNotFoundError`` if there is no compiler.

    With ``NPP_SANITIZE`` in the environment, undefined behaviour ends the process.
    """
    target = folder / "host.so"
    flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    if os.environ.get("NPP_SANITIZE"):  # takes three times as long to compile
        flags += ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    source = Path(__file__).with_name("host.cpp")
    if not target.exists():
        made = target.with_suffix(".tmp")
        command = [os.environ.get("CXX", "c++"), *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(made)]
        subprocess.run(command, check=True)
        made.replace(target)
    found = ctypes.CDLL(str(target))
    for name, result in {
        "chunk_elements": I64,
        "words_new": ctypes.c_void_p,
        "words_data": ctypes.POINTER(I64),
        "chunks": I64,
        "squares_on_host": F64,
        "clipping_factor": F64,
        "wrong_roots": I64,
        "wrong_quotients": I64,
    }.items():
        getattr(found, name).restype = result
    return found


class Table:
    """The host's copy of a table of tensors with ``slots`` ring slots."""

    def __init__(self, lib: ctypes.CDLL, sizes: Sequence[int], slots: int) -> None:
        self.lib, self.sizes, self.slots = lib, list(sizes), slots
        self._words = ctypes.c_void_p(lib.words_new(I64(len(sizes)), I64(slots)))
        self._sizes = (I64 * len(sizes))(*sizes)
        for i, size in enumerate(sizes):
            self.set(NUMEL, i, size)

    def __del__(self) -> None:
        self.lib.words_delete(self._words)

    def set(self, column: int, tensor: int, value: int) -> None:
        self.lib.words_set(self._words, column, I64(tensor), I64(value))

    def changed(self) -> tuple[int, int]:
        begin, end = I64(), I64()
        self.lib.words_changed(self._words, ctypes.byref(begin), ctypes.byref(end))
        return begin.value, end.value

    def sent(self) -> None:
        self.lib.words_sent(self._words)

    @property
    def data(self) -> ctypes.Array:
        return self.lib.words_data(self._words)

    def chunks(self) -> ctypes.Array:
        count = self.lib.chunks(self._sizes, I64(len(self.sizes)), None)
        found = (I64 * count)()
        self.lib.chunks(self._sizes, I64(len(self.sizes)), found)
        return found

    def spans(self) -> list[tuple[int, int, int]]:
        chunks = self.chunks()
        found = (I64 * (3 * len(chunks)))()
        self.lib.spans(self.data, I64(len(self.sizes)), chunks, I64(len(chunks)), found)
        return [(found[k], found[k + 1], found[k + 2]) for k in range(0, len(found), 3)]

    def hold(self, i: int, columns: dict[int, Tensor | None], slots: Sequence[Tensor], *, row: int = 0) -> None:
        """Enter the addresses of tensor ``i``."""
        addresses = [t.data_ptr() for t in [*columns.values(), *slots] if t is not None]
        for column, t in columns.items():
            self.set(column, i, 0 if t is None else t.data_ptr())
        for slot, t in enumerate(slots):
            self.set(SLOTS + slot, i, t.data_ptr())
        self.set(ALIGNED, i, int(all(a % 16 == 0 for a in addresses)))
        self.set(NUMBER, i, i)
        self.set(ROW, i, row)

    def step(
        self,
        dtypes: tuple[torch.dtype | str, torch.dtype, torch.dtype | str],
        rows: Tensor,
        slots: tuple[int, int, int] = (0, 0, 0),
        *,
        normaliser: int = 1,
        kind: int | None = None,
        ring_predicts: bool = False,
        seed: int | None = None,
        stochastic: bool | None = None,
        factor: float | None = None,
        threads: int = 5,
    ) -> None:
        """Run one pass.

        Args:
            rows: float64 of shape [rows, 10], the coefficients and the step number; [rows, 17] with a ``kind`` of
                correction.
            slots: the slots of the gradients, of the weights read and of the weights written.
            stochastic: whether to round stochastically; by default if there is a seed.
        """
        chunks = self.chunks()
        assert rows.dtype == torch.float64
        assert rows.shape[1] == self.lib.words_of_row(int(kind is not None))
        there_is_one = self.lib.step_on_host(
            self.data,
            I64(len(self.sizes)),
            chunks,
            I64(len(chunks)),
            ctypes.c_void_p(rows.data_ptr()),
            None if factor is None else ctypes.byref(F64(factor)),
            *slots,
            kind or 0,
            int(ring_predicts),
            ctypes.c_uint64(seed or 0),
            *(DTYPES[d] for d in dtypes),
            normaliser,
            int(kind is not None),
            int(seed is not None if stochastic is None else stochastic),
            threads,
        )
        assert there_is_one
