"""Bytes and byte-pair encodings."""

from __future__ import annotations

from pathlib import Path

import pytest

from nesterov_pp.training.config import UserError
from nesterov_pp.training.tokenizer import BpeTokenizer, ByteTokenizer

DOCUMENTS = [("the weights of a stage are late, late, late\n" * 40).encode(), "naïve café\r\n\n\n\tend ".encode()]


def test_bytes_there_and_back() -> None:
    every_byte = bytes(range(256))
    tokens = ByteTokenizer().encode([every_byte, b"ab"])
    assert tokens.tolist() == [*range(256), 97, 98]
    assert ByteTokenizer().decode([104, 105, 0xFF]) == "hi\ufffd"


def test_a_bpe_gives_back_the_text_in_fewer_tokens() -> None:
    tokenizer = BpeTokenizer.train(DOCUMENTS, 280)
    tokens = tokenizer.encode(DOCUMENTS)
    assert 256 < tokenizer.size <= 280
    assert int(tokens.max()) < tokenizer.size
    assert tokenizer.decode(tokens.tolist()) == b"".join(DOCUMENTS).decode()
    assert len(tokens) < 0.5 * sum(map(len, DOCUMENTS))


def test_a_bpe_knows_text_it_was_not_trained_on() -> None:
    tokenizer = BpeTokenizer.train(DOCUMENTS, 280)
    other = "completely different: \u4e2d\u6587 \U0001f600\n"
    assert tokenizer.decode(tokenizer.encode([other.encode()]).tolist()) == other


def test_training_a_bpe_again_gives_the_same_one(tmp_path: Path) -> None:
    first, second = (BpeTokenizer.train(DOCUMENTS, 300) for _ in range(2))
    assert first.definition == second.definition
    (tmp_path / "tokenizer.json").write_text(first.definition, encoding="utf-8")
    loaded = BpeTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.digest == first.digest
    assert loaded.encode(DOCUMENTS).tolist() == first.encode(DOCUMENTS).tolist()


def test_long_documents_are_encoded_whole() -> None:
    long = "".join(f"line {i}\n" for i in range(30_000))
    tokenizer = BpeTokenizer.train(DOCUMENTS, 260)
    assert tokenizer.decode(tokenizer.encode([long.encode()]).tolist()) == long


def test_a_bpe_refuses_what_is_not_text() -> None:
    with pytest.raises(UserError, match="--tokenizer bytes"):
        BpeTokenizer.train([b"fine so far \xff"], 300)


@pytest.mark.parametrize("content", [None, "", "{}", '{"model": 1}'])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        BpeTokenizer.load(path)
