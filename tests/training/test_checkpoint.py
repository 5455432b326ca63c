"""Checkpoints are complete or absent; the files around them."""

from __future__ import annotations

import os
import pickle
import resource
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from nesterov_pp.training import checkpoint
from nesterov_pp.training.config import RunError, UserError
from nesterov_pp.training.folder import RunFolder


class PowerCutError(BaseException):
    """A stand-in for the sudden end of the process."""


def state(value: float) -> dict[str, Any]:
    return {"pipeline": {"weights": [torch.full((1000,), value)], "names": ["a"]}, "totals": {"seconds": value}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 12, state(3.0))
    (path,) = checkpoint.checkpoints(tmp_path)
    loaded = checkpoint.load(path)
    assert loaded["microbatch"] == 12
    assert loaded["totals"] == {"seconds": 3.0}
    assert torch.equal(loaded["pipeline"]["weights"][0], torch.full((1000,), 3.0))


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for microbatch in (5, 90, 100, 1000):
        checkpoint.save(tmp_path, microbatch, state(float(microbatch)))
    kept = [checkpoint.load(path)["microbatch"] for path in checkpoint.checkpoints(tmp_path)]
    assert kept == [100, 1000]
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("when", ["replace", "fsync", "save"])
def test_a_crash_while_saving_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    checkpoint.save(tmp_path, 1, state(1.0))

    def cut(*_: Any, **__: Any) -> None:
        raise PowerCutError

    with monkeypatch.context() as patched:
        patched.setattr(torch if when == "save" else os, when, cut)
        with pytest.raises(PowerCutError):
            checkpoint.save(tmp_path, 2, state(2.0))
    (left,) = checkpoint.checkpoints(tmp_path)
    assert checkpoint.load(left)["totals"] == {"seconds": 1.0}
    with RunFolder(tmp_path).claimed():
        assert names(tmp_path) == [left.name]


def test_the_new_file_is_on_the_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        events.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "fsync file")
        fsync(handle)

    def noted_replace(source: Path, target: Path) -> None:
        events.append("replace")
        assert Path(source).parent == Path(target).parent
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    checkpoint.save(tmp_path, 1, state(1.0))
    assert events == ["fsync file", "replace", "fsync folder"]


def test_a_checkpoint_that_outgrows_the_disk_is_one_sentence_and_keeps_the_old_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1.0))
    before = names(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 10, 3000, 5000):  # in the middle of torch's archive, where torch reports an error of its own
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(RunError, match=r"checkpoint-000000002.pt cannot be written: File too large"):
                checkpoint.save(tmp_path, 2, state(2.0))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert names(tmp_path) == before
    assert checkpoint.load(tmp_path / before[0])["totals"] == {"seconds": 1.0}


def test_a_checkpoint_of_another_format_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-000000001.pt"
    torch.save({"format": "nesterov_pp run 99", "microbatch": 1}, path)
    with pytest.raises(UserError, match="was written by another version of nesterov_pp"):
        checkpoint.load(path)


def test_a_full_disk_is_one_sentence_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file: IO[bytes]) -> None:
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"file cannot be written: No space left on device"):
        checkpoint.write_atomic(path, write)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def truncate_to(share: float) -> Any:
    return lambda content: content[: int(len(content) * share)]


def flip_a_weight(content: bytes) -> bytes:
    middle = content.index(torch.full((1000,), 2.0).numpy().tobytes()) + 2000
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [truncate_to(0.0), truncate_to(0.3), truncate_to(0.999), flip_a_weight, lambda _: b"no zip at all" * 9],
    ids=["empty", "third", "almost whole", "one bit", "other file"],
)
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path: Path, damage: Any) -> None:
    checkpoint.save(tmp_path, 1, state(1.0))
    checkpoint.save(tmp_path, 2, state(2.0))
    before, newest = checkpoint.checkpoints(tmp_path)
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.raises(UserError) as raised:
        checkpoint.load(newest)
    assert raised.value.status == 2
    assert str(raised.value) == (
        f"{newest} is truncated or damaged; remove it, and --resume will continue from {before.name}"
    )


def test_the_only_checkpoint_damaged_means_to_start_from_the_beginning(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1.0))
    (only,) = checkpoint.checkpoints(tmp_path)
    only.write_bytes(b"")
    with pytest.raises(UserError, match="start from the beginning"):
        checkpoint.load(only)


def test_a_file_with_code_in_it_is_not_executed(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "executed"),))

    path = tmp_path / "checkpoint-000000001.pt"
    torch.save({"format": Attack()}, path, pickle_module=pickle)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-000000001.pt"
    torch.save({"model": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path)


def test_a_folder_is_for_one_process_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.claimed(), pytest.raises(UserError, match="another process is training"), folder.claimed():
        pass
    with folder.claimed():
        pass


def test_what_a_folder_may_hold(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.recorded(resume=False) is None
    assert folder.recorded(resume=True) is None
    folder.path.mkdir()
    (folder.path / ".config.json.part").touch()
    assert folder.recorded(resume=True) is None
    (folder.path / "thesis.tex").touch()
    for resume in (False, True):
        with pytest.raises(UserError, match="holds other files but no run"):
            folder.recorded(resume=resume)
    folder.config.write_text('{"a": 1}')
    assert folder.recorded(resume=True) == {"a": 1}
    with pytest.raises(UserError, match="add --resume to continue it, or give another --out"):
        folder.recorded(resume=False)
    folder.config.write_text('{"a": ')
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        folder.recorded(resume=True)
