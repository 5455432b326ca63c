"""Text, its split, and microbatches by number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nesterov_pp.training.config import UserError
from nesterov_pp.training.data import Corpus, read_text, tokenize
from nesterov_pp.training.tokenizer import ByteTokenizer

CONTEXT = 8


def folder_with(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def documents(count: int) -> dict[str, bytes]:
    return {f"part{i % 3}/{i}.txt": f"this is document {i}\n".encode() for i in range(count)}


def counting_corpus(size: int = 1000) -> Corpus:
    """Return a corpus in which each token is its own position."""
    return Corpus(torch.arange(size, dtype=torch.int32), torch.arange(size, dtype=torch.int32))


def test_a_file_is_split_at_nine_tenths(tmp_path: Path) -> None:
    content = bytes(range(1, 101))  # most of it is not UTF-8
    (tmp_path / "a.txt").write_bytes(content)
    text = read_text(str(tmp_path / "a.txt"))
    assert text.train == [content[:90]]
    assert text.validation == [content[90:]]


def test_a_folder_is_split_by_file(tmp_path: Path) -> None:
    files = documents(50)
    text = read_text(str(folder_with(tmp_path, files)))
    assert sorted(text.train + text.validation) == sorted(files.values())
    assert len(text.validation) == 5


def test_the_split_depends_on_names_and_not_on_the_order_of_creation(tmp_path: Path) -> None:
    files = documents(30)
    forth = read_text(str(folder_with(tmp_path / "forth", files)))
    back = read_text(str(folder_with(tmp_path / "back", dict(reversed(files.items())))))
    assert (forth.train, forth.validation) == (back.train, back.validation)
    assert forth.digest == back.digest


@pytest.mark.parametrize("sizes", [[63, 100_000], [100_000, 63], [1, 1, 500], [40, 40], [7] * 9, [500, 300, 200, 9]])
def test_a_tenth_of_the_bytes_of_a_folder_is_for_validation(tmp_path: Path, sizes: list[int]) -> None:
    for names in (["README", "large.txt", "c", "d"], ["z.md", "a.txt", "y", "x"]):
        files = {f"{k}{names[k % 4]}": bytes([65 + k]) * size for k, size in enumerate(sizes)}
        text = read_text(str(folder_with(tmp_path / names[0], files)))
        assert sum(map(len, text.train)) == int(0.9 * sum(sizes))
        both = b"".join(text.train + text.validation)
        assert sorted(both) == sorted(b"".join(files.values()))
        cut = [part for part in text.train if part not in files.values()]
        assert len(cut) <= 1
        assert all(part and part in files[name] for part in cut for name in files if files[name][:1] == part[:1])


def test_bytes_are_cut_between_characters_only_if_asked_to(tmp_path: Path) -> None:
    for k in range(3):
        content = b"x" * k + "\u4e2d\u6587".encode() * 50
        (tmp_path / "a.txt").write_bytes(content)
        cut = int(0.9 * len(content))
        assert read_text(str(tmp_path / "a.txt")).train == [content[:cut]]
        text = read_text(str(tmp_path / "a.txt"), whole_characters=True)
        assert cut - 3 < len(text.train[0]) <= cut
        assert (text.train[0] + text.validation[0]).decode() == content.decode()
        assert text.train[0].decode() + text.validation[0].decode() == content.decode()


def test_what_is_no_file_is_refused() -> None:
    with pytest.raises(UserError, match="/dev/null is neither a file nor a folder"):
        read_text("/dev/null")


def test_binary_empty_and_hidden_files_of_a_folder_are_left_out(tmp_path: Path) -> None:
    extra = {"image.png": b"\x89PNG\0\0", "nothing.txt": b"", ".git/config": b"secret", ".hidden": b"secret"}
    text = read_text(str(folder_with(tmp_path, {**documents(10), **extra})))
    assert sorted(text.train + text.validation) == sorted(documents(10).values())
    assert text.skipped == 2


def test_one_text_file_in_a_folder_is_split_like_a_file(tmp_path: Path) -> None:
    text = read_text(str(folder_with(tmp_path, {"only.txt": b"x" * 90 + b"y" * 10, "image.png": b"\0"})))
    assert text.train == [b"x" * 90]
    assert text.validation == [b"y" * 10]


def test_the_digest_sees_content_and_split(tmp_path: Path) -> None:
    digests = set()
    for k, content in enumerate([b"ab" * 50, b"ba" * 50, b"ab" * 51]):
        (tmp_path / f"{k}.txt").write_bytes(content)
        digests.add(read_text(str(tmp_path / f"{k}.txt")).digest)
    assert len(digests) == 3


def test_without_data_it_reads_the_standard_library() -> None:
    text = read_text(None)
    assert any(b"class TextWrapper" in document for document in text.train + text.validation)
    assert not any(b"class TestTextWrapper" in document for document in text.train + text.validation)
    size = sum(map(len, text.train))
    assert size > 1_000_000
    assert 0.02 * size < sum(map(len, text.validation)) < 0.25 * size
    assert text.digest == read_text(None).digest


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no files"),
        ({"a.txt": b"", "b.bin": b"\0"}, "2 files are empty or binary"),
    ],
)
def test_a_folder_without_text_is_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_text(str(folder_with(tmp_path, files)))


def test_text_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 80)
    text = read_text(str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match=r"needs at least 9 tokens of validation text, but .* has 8"):
        tokenize(text, ByteTokenizer(), CONTEXT)


def test_the_shortest_text_will_do() -> None:
    corpus = counting_corpus(CONTEXT + 1)
    for inputs, targets in [corpus.batch(0, 0, 3, CONTEXT), *corpus.validation_batches(2, 3, CONTEXT)]:
        assert inputs.tolist() == [list(range(CONTEXT))] * 3
        assert targets.tolist() == [list(range(1, CONTEXT + 1))] * 3


def test_targets_are_the_tokens_after_the_inputs() -> None:
    inputs, targets = counting_corpus().batch(0, 5, 4, CONTEXT)
    assert inputs.shape == targets.shape == (4, CONTEXT)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs + 1, targets)
    assert torch.equal(inputs[:, :1] + torch.arange(CONTEXT), inputs)


def test_a_batch_is_a_function_of_seed_and_number_alone() -> None:
    corpus = counting_corpus()
    forward = [corpus.batch(3, m, 4, CONTEXT)[0] for m in range(20)]
    torch.manual_seed(7)
    backward = [corpus.batch(3, m, 4, CONTEXT)[0] for m in reversed(range(20))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert len({tuple(batch.flatten().tolist()) for batch in forward}) == 20
    assert not torch.equal(forward[0], corpus.batch(4, 0, 4, CONTEXT)[0])


def test_batches_reach_the_whole_text() -> None:
    seen = {int(i) for m in range(400) for i in counting_corpus(60).batch(0, m, 4, CONTEXT)[1].flatten()}
    assert seen == set(range(1, 60))


def test_validation_windows_are_fixed_and_evenly_spaced() -> None:
    corpus = counting_corpus()
    batches = corpus.validation_batches(4, 5, CONTEXT)
    starts = torch.cat([inputs[:, 0] for inputs, _ in batches])
    assert starts[0] == 0
    assert starts[-1] == 1000 - CONTEXT - 1
    gaps = starts.diff()
    assert gaps.max() - gaps.min() <= 1
    again = corpus.validation_batches(4, 5, CONTEXT)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(batches, again, strict=True))
