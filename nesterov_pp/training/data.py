"""The train and validation tokens of a text, and microbatches by number."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Collection, Iterator, Mapping
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


def read_text(data: str | None, *, whole_characters: bool = False) -> Text:
    """Read a file or a folder, a tenth of whose bytes are for validation; without ``data``, Python's standard library.

    A file is cut at nine tenths. In a folder, whole files are taken for validation, in an order that depends on their
    paths alone; the last of them is cut, so that the share is a tenth whatever the sizes of the files. Files that are
    hidden, empty or binary (they contain NUL bytes) and hidden folders are left out. The standard library is split by
    file: a tenth of its files is for validation.

    Args:
        data: path of the file or folder.
        whole_characters: cut before a character of UTF-8, not inside one.

    Raises:
        UserError: ``data`` does not exist, cannot be read, or contains no text.
    """
    if data is None:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [p for p in _files(root, _NOT_CORPUS) if p.suffix == ".py"]
        if len(paths) < 2:
            raise UserError(f"this Python has no standard library source in {root}; give a text with --data")
        texts, skipped = _texts(root, paths)
        return _split_by_file(f"the Python {platform.python_version()} standard library", texts, skipped)
    path = Path(data)
    if path.is_dir():
        texts, skipped = _texts(path, list(_files(path)))
        return _split_by_bytes(str(path), texts, skipped, whole_characters)
    if not os.path.lexists(path):
        raise UserError(f"--data {path} does not exist; give a text file or a folder of text files")
    if path.exists() and not path.is_file():
        raise UserError(f"--data {path} is neither a file nor a folder; give a text file or a folder of text files")
    content = _read(path)
    if not content:
        raise UserError(f"--data {path} is empty; give a file with text in it")
    if b"\0" in content:
        raise UserError(f"--data {path} is binary (it contains NUL bytes); give a text file")
    return _split_by_bytes(str(path), {path.name: content}, 0, whole_characters)


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


def _texts(root: Path, paths: list[Path]) -> tuple[dict[str, bytes], int]:
    """Return the contents of the files with text in them by their paths below ``root``, and the number of others."""
    contents = {p.relative_to(root).as_posix(): _read(p) for p in paths}
    texts = {p: c for p, c in contents.items() if c and b"\0" not in c}
    if not texts:
        found = f"its {len(contents)} files are empty or binary" if contents else "it has no files"
        raise UserError(f"--data {root} holds no text ({found}); give a folder of text files")
    return texts, len(contents) - len(texts)


def _by_hash(texts: Mapping[str, bytes]) -> list[str]:
    return sorted(texts, key=lambda path: hashlib.sha256(os.fsencode(path)).digest())


def _split_by_file(name: str, texts: Mapping[str, bytes], skipped: int) -> Text:
    """Split the files: validation is the tenth of them whose paths have the smallest hashes."""
    held_out = set(_by_hash(texts)[: max(1, round(VALIDATION_SHARE * len(texts)))])
    train = [content for path, content in texts.items() if path not in held_out]
    return Text(name, train, [content for path, content in texts.items() if path in held_out], skipped)


def _split_by_bytes(name: str, texts: Mapping[str, bytes], skipped: int, whole_characters: bool) -> Text:
    """Split the bytes: validation is a tenth of them, from the files whose paths have the smallest hashes.

    The last of these files has room for its end only; its beginning is for training.
    """
    total = sum(map(len, texts.values()))
    room = total - int(total * (1.0 - VALIDATION_SHARE))
    cuts: dict[str, int] = {}
    for path in _by_hash(texts):
        size = len(texts[path])
        cuts[path] = _cut(texts[path], max(0, size - room), whole_characters)
        room -= min(room, size)
    train = [content[: cuts[path]] for path, content in texts.items() if cuts[path] > 0]
    validation = [content[cuts[path] :] for path, content in texts.items() if cuts[path] < len(content)]
    return Text(name, train, validation, skipped)


def _cut(content: bytes, place: int, whole_characters: bool) -> int:
    """Return where to cut: at ``place``, or up to three bytes before it, where a character of UTF-8 begins."""
    if not whole_characters:
        return place
    starts = (k for k in range(place, max(-1, place - 4), -1) if k == len(content) or content[k] & 0xC0 != 0x80)
    return next(starts, place)
