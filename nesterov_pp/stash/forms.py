"""The forms in which a ring keeps versions of its weights older than the newest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from nesterov_pp.kernels import differences
from nesterov_pp.kernels.differences import flat

OldVersions = Literal["full", "bfloat16", "8bit-differences"]
FORMS: tuple[OldVersions, ...] = ("full", "bfloat16", "8bit-differences")

SavedRow = dict[str, Tensor]


class Form(Protocol):
    """Rows of older versions of a list of tensors, each shorter than the tensors."""

    dtypes: ClassVar[Sequence[torch.dtype]]
    """The dtypes of tensors that the form takes."""

    each: ClassVar[float]
    """Bytes of an element in a row."""

    def __init__(self, tensors: Sequence[Tensor], rows: int) -> None: ...

    def keep(self, row: int, version: Sequence[Tensor], following: Sequence[Tensor]) -> None:
        """Keep a version in a row; ``following`` is the version after it."""

    def restore(self, newest: Sequence[Tensor], rows: Sequence[int], out: Sequence[Tensor]) -> None:
        """Write the version in the last of ``rows``, which are those of all since too, newest first, to ``out``."""

    def restore_one(self, number: int, newest: Tensor, rows: Sequence[int], out: Tensor) -> None:
        """Write one tensor of that version, the one with this number in the list, to ``out``."""

    def row(self, row: int) -> SavedRow:
        """Return the tensors of a row, not copied."""

    @property
    def nbytes(self) -> int:
        """The bytes of all rows."""


class Differences:
    """8-bit differences (``kernels.differences``): 1.0625 bytes for each element and version."""

    dtypes: ClassVar[Sequence[torch.dtype]] = differences.DTYPES
    each: ClassVar[float] = 1.0 + torch.bfloat16.itemsize / differences.GROUP

    def __init__(self, tensors: Sequence[Tensor], rows: int) -> None:
        self._codes, self._scales = differences.new_rows(tensors, rows)
        self._places = differences.places(tensors)

    def keep(self, row: int, version: Sequence[Tensor], following: Sequence[Tensor]) -> None:
        differences.encode(version, following, self._codes, self._scales, row)

    def restore(self, newest: Sequence[Tensor], rows: Sequence[int], out: Sequence[Tensor]) -> None:
        differences.decode(newest, out, self._codes, self._scales, rows)

    def restore_one(self, number: int, newest: Tensor, rows: Sequence[int], out: Tensor) -> None:
        begin, end = self._places[number : number + 2]
        codes = self._codes[:, begin:end]
        scales = self._scales[:, begin // differences.GROUP : end // differences.GROUP]
        differences.decode([newest], [out], codes, scales, rows)

    def row(self, row: int) -> SavedRow:
        return {"codes": self._codes[row], "scales": self._scales[row]}

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes


class Rounded:
    """Weights rounded to bfloat16: 2 bytes for each element and version."""

    dtypes: ClassVar[Sequence[torch.dtype]] = (torch.float32, torch.bfloat16)
    each: ClassVar[float] = torch.bfloat16.itemsize

    def __init__(self, tensors: Sequence[Tensor], rows: int) -> None:
        self._sizes = [t.numel() for t in tensors]
        device = tensors[0].device if tensors else torch.device("cpu")
        with torch.inference_mode(False):
            self._values = torch.zeros(rows, sum(self._sizes), dtype=torch.bfloat16, device=device)

    @torch.no_grad()
    def keep(self, row: int, version: Sequence[Tensor], following: Sequence[Tensor]) -> None:
        for to, t in zip(torch.split(self._values[row], self._sizes), version, strict=True):
            to.copy_(flat(t))

    @torch.no_grad()
    def restore(self, newest: Sequence[Tensor], rows: Sequence[int], out: Sequence[Tensor]) -> None:
        for values, to in zip(torch.split(self._values[rows[-1]], self._sizes), out, strict=True):
            flat(to).copy_(values)

    @torch.no_grad()
    def restore_one(self, number: int, newest: Tensor, rows: Sequence[int], out: Tensor) -> None:
        begin = sum(self._sizes[:number])
        flat(out).copy_(self._values[rows[-1], begin : begin + self._sizes[number]])

    def row(self, row: int) -> SavedRow:
        return {"values": self._values[row]}

    @property
    def nbytes(self) -> int:
        return self._values.nbytes


_CLASSES: dict[str, type[Differences] | type[Rounded]] = {"8bit-differences": Differences, "bfloat16": Rounded}


def check_form(form: str, named: Mapping[str, Tensor]) -> None:
    """Raise ValueError if there is no such form, or it cannot keep versions of these parameters."""
    if form not in FORMS:
        raise ValueError(f"old_versions must be one of {', '.join(map(repr, FORMS))}, not {form!r}")
    if form == "full":
        return
    for name, p in named.items():
        if hasattr(p, "to_local"):
            raise ValueError(f"old_versions={form!r} keeps plain tensors, but {name} is a DTensor; use 'full'")
        known = _CLASSES[form].dtypes
        if p.dtype not in known:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in known)
            found = str(p.dtype).removeprefix("torch.")
            raise ValueError(f"old_versions={form!r} keeps weights of {names}, but {name} is {found}; use 'full'")
    if len({p.device for p in named.values()}) > 1:
        raise ValueError(f"old_versions={form!r} keeps weights of one device; use 'full'")


def is_short(form: str, versions: int) -> bool:
    """Return whether a ring of so many versions keeps older ones in another form than in full."""
    return form != "full" and versions > 1


def ring_bytes(form: str, versions: int, itemsize: int, *, buffer: bool = False) -> float:
    """Return the bytes of a ring for each weight of ``itemsize`` bytes, the newest version included.

    With a ``buffer``, older versions in a short form are also decoded as a whole, to memory of their own.
    """
    if not is_short(form, versions):
        return float(versions * itemsize)
    return (2 if buffer else 1) * itemsize + (versions - 1) * _CLASSES[form].each


def new_form(form: str, tensors: Sequence[Tensor], rows: int) -> Form:
    """Return a form that ``check_form`` has accepted, with rows of zeros."""
    return _CLASSES[form](tensors, rows)


def check_rows(form: str, like: Sequence[Tensor], saved: Sequence[Any]) -> None:
    """Raise ValueError unless ``saved`` are rows of tensors like these."""
    if form not in _CLASSES:
        raise ValueError(f"the older versions were saved as {form!r}, which is none of {', '.join(FORMS)}")
    wanted = new_form(form, like, 1).row(0)
    for row in saved:
        if not isinstance(row, dict) or row.keys() != wanted.keys():
            raise ValueError(f"older versions saved as {form!r} must be dicts of {', '.join(wanted)}")
        for name, t in wanted.items():
            found = row[name]
            if not isinstance(found, Tensor) or found.shape != t.shape or found.dtype != t.dtype:
                raise ValueError(f"the saved {name} of older versions do not fit the parameters here")


@torch.no_grad()
def load_rows(form: Form, numbers: Sequence[int], saved: Sequence[SavedRow]) -> None:
    """Copy saved rows to the rows with these numbers."""
    for number, row in zip(numbers, saved, strict=True):
        for name, t in form.row(number).items():
            t.copy_(row[name])


def restored(form: str, newest: Sequence[Tensor], saved: Sequence[SavedRow]) -> list[list[Tensor]]:
    """Return the older versions, oldest first, in full. ``saved`` are their rows, in the same order."""
    rows = new_form(form, newest, len(saved))
    load_rows(rows, range(len(saved)), saved)
    versions = []
    for k in range(len(saved)):
        out = [torch.empty_like(t, memory_format=torch.preserve_format) for t in newest]
        rows.restore(newest, list(range(len(saved) - 1, k - 1, -1)), out)
        versions.append(out)
    return versions
