"""The train and validation tokens of a text, and microbatches by number."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nesterov_pp.training.config import UserError, derived_seed
from nesterov_pp.training.tokenizer import Tokenizer

VALIDATION_SHARE = 0.1
# Left out of the standard library: tests and demos, generated tables, and what pip installed.
_NOT_CORPUS = {"site-packages", "dist-packages", "test", "tests", "encodings", "idlelib", "lib2to3", "pydoc_data"}


@dataclass(frozen=True)
class Text:
    """Documents as bytes, in a fixed order, split into train and validation.

    ``skipped`` counts the files of a folder that were left out because they are empty or binary.
    """

    name: str
    train: list[bytes]
    validation: list[bytes]
    skipped: int = 0

    @property
    def digest(self) -> str:
        """A hash of the content and its split."""
        total = hashlib.sha256()
        for part in (self.train, self.validation):
            for document in part:
                total.update(len(document).to_bytes(8, "little") + document)
            total.update(b"\0split")
        return total.hexdigest()


@dataclass(frozen=True)
class Corpus:
    """The tokens of a text, as 1-d integer tensors."""

    train: Tensor
    validation: Tensor

    def batch(self, seed: int, microbatch: int, size: int, context: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a microbatch, each ``(size, context)`` int64: random windows of the train text.

        They depend on the seed and the microbatch's number alone.
        """
        generator = torch.Generator().manual_seed(derived_seed("batch", seed, microbatch))
        starts = torch.randint(len(self.train) - context, (size,), generator=generator)
        return _windows(self.train, starts, context)

    def validation_batches(self, count: int, size: int, context: int) -> list[tuple[Tensor, Tensor]]:
        """Return ``count`` batches of windows evenly spaced over the validation text, always the same ones."""
        starts = torch.linspace(0, len(self.validation) - context - 1, count * size, dtype=torch.float64).long()
        return [_windows(self.validation, part, context) for part in starts.view(count, size)]


def _windows(tokens: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    rows = tokens[starts[:, None] + torch.arange(context + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def tokenize(text: Text, tokenizer: Tokenizer, context: int) -> Corpus:
    """Return the tokens of a text.

    Raises:
        UserError: the train or validation text is shorter than one sequence and its last target.
    """
    parts = {}
    for name, documents in (("train", text.train), ("validation", text.validation)):
        parts[name] = tokenizer.encode(documents)
        if len(parts[name]) < context + 1:
            raise UserError(
                f"--context {context} needs at least {context + 1} tokens of {name} text, "
                f"but {text.name} has {len(parts[name])}; use a shorter context or more text"
            )
    return Corpus(**parts)


def read_text(data: str | None) -> Text:
    """Read a file, split at nine tenths, or a folder, split by file; without ``data``, Python's standard library.

    In a folder, files that are hidden, empty or binary (they contain NUL bytes) and hidden folders are left out.

    Raises:
        UserError: ``data`` does not exist, cannot be read, or contains no text.
    """
    if data is None:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [p for p in _files(root, _NOT_CORPUS) if p.suffix == ".py"]
        if len(paths) < 2:
            raise UserError(f"this Python has no standard library source in {root}; give a text with --data")
        return _split_by_file(f"the Python {platform.python_version()} standard library", root, paths)
    path = Path(data)
    if path.is_dir():
        return _split_by_file(str(path), path, list(_files(path)))
    if not path.exists():
        raise UserError(f"--data {path} does not exist; give a text file or a folder of text files")
    content = _read(path)
    if not content:
        raise UserError(f"--data {path} is empty; give a file with text in it")
    if b"\0" in content:
        raise UserError(f"--data {path} is binary (it contains NUL bytes); give a text file")
    return _split_one(str(path), content)


def _files(root: Path, left_out: Collection[str] = ()) -> Iterator[Path]:
    """Yield regular files below ``root``, neither hidden nor left out, in an order independent of the file system."""
    for folder, folders, names in os.walk(root, onerror=_refuse):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in left_out)
        for name in sorted(names):
            path = Path(folder) / name
            if not name.startswith(".") and name not in left_out and path.is_file():
                yield path


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read: {error.strerror}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _split_one(name: str, content: bytes) -> Text:
    cut = int(len(content) * (1.0 - VALIDATION_SHARE))
    return Text(name, [content[:cut]], [content[cut:]])


def _split_by_file(name: str, root: Path, paths: list[Path]) -> Text:
    """Split the files: validation is the tenth of them (at least one) whose paths have the smallest hashes."""
    contents = {p.relative_to(root).as_posix(): _read(p) for p in paths}
    texts = {p: c for p, c in contents.items() if c and b"\0" not in c}
    if not texts:
        found = f"its {len(contents)} files are empty or binary" if contents else "it has no files"
        raise UserError(f"--data {name} holds no text ({found}); give a folder of text files")
    skipped = len(contents) - len(texts)
    if len(texts) == 1:
        alone = _split_one(name, next(iter(texts.values())))
        return Text(name, alone.train, alone.validation, skipped)
    by_hash = sorted(texts, key=lambda p: hashlib.sha256(os.fsencode(p)).digest())
    held_out = set(by_hash[: max(1, round(VALIDATION_SHARE * len(texts)))])
    train = [content for path, content in texts.items() if path not in held_out]
    return Text(name, train, [content for path, content in texts.items() if path in held_out], skipped)
