"""Tokenizers, from text to tokens and back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nesterov_pp.training.config import UserError

_PIECE = 1 << 14  # characters in a piece of text
_BATCH = 64  # pieces encoded in one call: enough for every core, and little memory


class Tokenizer(Protocol):
    """A tokenizer with ``size`` tokens, numbered from 0. ``digest`` tells two tokenizers apart."""

    size: int
    digest: str

    def encode(self, documents: Sequence[bytes]) -> Tensor:
        """Return the tokens of the documents, one after the other, as a 1-d integer tensor."""

    def decode(self, tokens: list[int]) -> str:
        """Return the text of the tokens; what is not UTF-8 becomes U+FFFD."""


class ByteTokenizer:
    """A tokenizer with one token per byte."""

    size = 256
    digest = "bytes"

    def encode(self, documents: Sequence[bytes]) -> Tensor:
        joined = bytearray(b"".join(documents))
        return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


class BpeTokenizer:
    """Byte-level byte-pair encoding; ``definition`` is the JSON of the ``tokenizers`` package."""

    def __init__(self, definition: str) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        self.definition = definition
        self.size: int = self._tokenizer.get_vocab_size()
        self.digest = hashlib.sha256(definition.encode()).hexdigest()

    @classmethod
    def train(cls, documents: Sequence[bytes], vocab_size: int) -> BpeTokenizer:
        """Train a vocabulary of at most ``vocab_size`` tokens; the same documents give the same vocabulary.

        Raises:
            UserError: a document is not UTF-8.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(_pieces(documents), trainer)
        return cls(tokenizer.to_str())

    @classmethod
    def load(cls, path: Path) -> BpeTokenizer:
        """Load a saved tokenizer; raise UserError if the file is missing or is not a tokenizer."""
        try:
            return cls(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; the run cannot continue without it") from None
        except Exception:  # the package raises bare Exception
            raise UserError(f"{path} is damaged; the run cannot continue without it") from None

    def encode(self, documents: Sequence[bytes]) -> Tensor:
        pieces = _pieces(documents)
        parts = [torch.empty(0, dtype=torch.int32)]
        while batch := list(islice(pieces, _BATCH)):
            ids = [i for encoding in self._tokenizer.encode_batch(batch) for i in encoding.ids]
            parts.append(torch.tensor(ids, dtype=torch.int32))
        return torch.cat(parts)

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))


def check_text(documents: Sequence[bytes]) -> None:
    """Raise UserError if a document is not UTF-8."""
    for _ in _pieces(documents):
        pass


def _pieces(documents: Sequence[bytes]) -> Iterator[str]:
    """Yield the documents as text, cut at line ends into pieces of moderate size."""
    for document in documents:
        try:
            text = document.decode("utf-8")
        except UnicodeDecodeError as error:
            start = document[max(0, error.start - 20) : error.start].decode("utf-8", errors="replace")
            raise UserError(
                f"--tokenizer bpe needs UTF-8 text, but the byte after {start!r} is not valid; use --tokenizer bytes"
            ) from None
        piece: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            piece.append(line)
            size += len(line)
            if size >= _PIECE:
                yield "".join(piece)
                piece, size = [], 0
        if piece:
            yield "".join(piece)
