"""The command line: what it refuses and how, and what it lists."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nesterov_pp
from nesterov_pp.cli import COMPARED, PRESETS, main
from nesterov_pp.kernels import available_backends, backend
from nesterov_pp.pipeline import recipes
from nesterov_pp.training.config import Config

TEXT = "some words to learn from, again and again\n" * 200


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working folder with good and bad data, a folder with files in it, and a file where a folder should be."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "latin.txt").write_bytes(TEXT.encode() + b"caf\xe9\n" + TEXT.encode())
    (tmp_path / "empty.txt").touch()
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0\0" * 100)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "image.png").write_bytes(b"\0" * 100)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = "--data text.txt --stages 2 --layers 2 --width 8 --heads 1 --context 8 --batch 2 --microbatches 4"

BAD = [
    ("", "required: COMMAND"),
    ("tarin", "invalid choice: 'tarin'"),
    ("train --lr x", "argument --lr: needs a number above 0, not 'x'"),
    ("train --lr -1", "argument --lr: needs a number above 0, not '-1'"),
    ("train --lr nan", "argument --lr: needs a number above 0, not 'nan'"),
    ("train --lr", "argument --lr: expected one argument"),
    ("train --stages 0", "argument --stages: needs a whole number of at least 1, not '0'"),
    ("train --microbatches 1.5", "argument --microbatches: needs a whole number of at least 1, not '1.5'"),
    ("train --dropout 1", "argument --dropout: needs a number from 0 to below 1, not '1'"),
    ("train --tokenizer words", "argument --tokenizer: needs one of bytes, bpe, not 'words'"),
    ("train --vocab-size 256", "argument --vocab-size: needs a whole number of at least 257"),
    ("train --flush-every 0", "argument --flush-every"),
    ("train --max-grad-norm 0", "argument --max-grad-norm"),
    ("train --checkpoint-every -1", "argument --checkpoint-every"),
    ("train --seed -1", "argument --seed"),
    ("train --batch 0", "argument --batch"),
    ("train --autocast float8", "argument --autocast: needs one of bfloat16, not 'float8'"),
    ("train --recompute maybe", "argument --recompute: needs yes or no, not 'maybe'"),
    ("train --method nesterov-no-stash --recompute", "activations of older weights, which cannot be recomputed"),
    ("train --device gpu", "argument --device: needs one of cpu, cuda, not 'gpu'"),
    *(
        []
        if torch.cuda.is_available()
        else [("train --device cuda", "--device cuda needs a GPU, but torch finds none")]
    ),
    ("train --backend gpu", "argument --backend: needs one of auto, "),
    ("train --backend cuda --data text.txt", "backend 'cuda' cannot be used: "),
    ("train --stag 4", "unrecognized arguments: --stag"),
    ("train --learning-rate 1", "unrecognized arguments: --learning-rate"),
    ("train surplus", "unrecognized arguments: surplus"),
    ("train --method adam", "unknown method 'adam'; choose one of nesterov, nesterov-no-stash, nesterov-sgd"),
    ("train --stages 9", "8 layers cannot fill 9 stages"),
    ("train --heads 5", "--width must be a multiple of --heads"),
    ("train --method gpipe --microbatches 10", "must be a multiple of 4, not 10"),
    ("train --data nowhere.txt", "nowhere.txt does not exist"),
    ("train --data empty.txt", "empty.txt is empty"),
    ("train --data image.png", "image.png is binary"),
    ("train --data nothing", "nothing holds no text (it has no files)"),
    ("train --data pictures", "pictures holds no text (its 1 files are empty or binary)"),
    ("train --data text.txt --context 5000", "--context 5000 needs at least 5001 tokens of validation text"),
    ("train --data latin.txt --tokenizer bpe", "--tokenizer bpe needs UTF-8 text"),
    ("train --data text.txt --width 4194304 --heads 1", "not enough memory"),
    (f"train {SMALL} --out text.txt", "--out text.txt cannot be used: Not a directory"),
    (f"train {SMALL} --out text.txt/deep", "--out text.txt/deep cannot be used: Not a directory"),
    (f"train {SMALL} --out /proc/nowhere", "--out /proc/nowhere cannot be created"),
    (f"train {SMALL} --out thesis", "thesis holds other files but no run"),
    (f"train {SMALL} --out thesis --resume", "thesis holds other files but no run"),
    ("compare --methods nesterov,adam --data text.txt", "unknown method 'adam'"),
    ("compare --methods nesterov,nesterov", "argument --methods: needs distinct names"),
    ("compare --methods ,", "argument --methods: needs distinct names"),
    ("compare --seeds 0,one", "argument --seeds: needs a whole number of at least 0, not 'one'"),
    ("compare --seeds 0,00", "argument --seeds: needs distinct numbers"),
    ("compare --lr 0.1,0.10", "argument --lr: needs distinct numbers"),
    ("compare --seeds 0,18446744073709551616", "argument --seeds: needs a whole number of at most 1844674407370955161"),
    ("train --seed 18446744073709551616", "argument --seed: needs a whole number of at most 18446744073709551615"),
    (f"train --seed 1{'0' * 5000}", "argument --seed: needs a whole number of at most 18446744073709551615"),
    ("train --microbatches 1000000000", "argument --microbatches: needs a whole number of at most 999999999"),
    ("train --threads 1000000", "argument --threads: needs a whole number of at most 1024"),
    ("train --temperature 1e-300", "argument --temperature: needs a number from 1e-30 to 1e+30"),
    ("train --lr 1e308", "argument --lr: needs a number from 1e-30 to 1e+30"),
    (f"train {SMALL} --delays uniform:0-99999999999", "delays can be at most 10000 updates"),
    (f"train {SMALL} --delays geometric:inf", "delays must be given as own"),
    (f"train {SMALL} --delays trace:image.png", "names a file that is not text"),
    ("plan --width 7", "--width must be a multiple of --heads"),
    ("plan --per-update 99999999", "argument --per-update: needs a whole number of at most 10000"),
    ("plan --speed 1e-320", "argument --speed: needs a number from 1e-12 to 1e+12"),
    ("reshard --run text.txt --stages 1 --out new", "text.txt holds no run; give the folder of a run"),
    ("train --unheard-of 1", "(see python -m nesterov_pp train --help)"),
    ("compare surplus", "(see python -m nesterov_pp compare --help)"),
    ("plan --unheard-of", "(see python -m nesterov_pp plan --help)"),
    ("analyze --unheard-of", "(see python -m nesterov_pp analyze --help)"),
    ("reshard --stages 2", "(see python -m nesterov_pp reshard --help)"),
    ("info --unheard-of", "(see python -m nesterov_pp info --help)"),
    ("--unheard-of", "(see python -m nesterov_pp --help)"),
    ("compare --seeds -1", "argument --seeds"),
    ("compare --jobs 0", "argument --jobs: needs a whole number of at least 1"),
    ("compare --preset huge", "argument --preset: needs one of demo"),
    ("compare --method nesterov", "unrecognized arguments: --method"),
    ("compare --data empty.txt", "empty.txt is empty"),
    ("compare --data text.txt --context 5000", "--context 5000 needs at least 5001 tokens"),
    ("compare --data latin.txt --tokenizer bpe", "--tokenizer bpe needs UTF-8 text"),
    ("compare --data text.txt --out thesis", "thesis is not empty; add --resume"),
    ("compare --data text.txt --out text.txt", "--out text.txt cannot be used"),
    ("methods --all", "unrecognized arguments: --all"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line[:60] or "nothing" for line, _ in BAD])
def test_bad_input_is_one_sentence_and_changes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    before = snapshot(place)
    try:
        status = main(line.split())
    except SystemExit as exit_:  # argparse
        status = int(exit_.code or 0)
    printed = capsys.readouterr()
    assert status == 2
    (sentence,) = printed.err.splitlines()
    assert sentence.startswith("nesterov_pp: error: ")
    assert message in sentence
    assert printed.out == ""
    assert snapshot(place) == before


@pytest.mark.parametrize(
    "line", ["train --lr x", "train --data empty.txt", f"train {SMALL} --out thesis", "compare --data nowhere.txt"]
)
def test_a_real_process_refuses_alike(place: Path, line: str) -> None:
    before = snapshot(place)
    result = python_m(*line.split(), cwd=place)
    assert result.returncode == 2
    assert result.stdout == ""
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith("nesterov_pp: error: ")
    assert snapshot(place) == before


def python_m(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nesterov_pp", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # readline may set it
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)


def test_a_real_process_trains(place: Path) -> None:
    """``--out`` defaults to ``runs/METHOD``."""
    result = python_m("train", *SMALL.split(), "--sample-length", "4", "--method", "pipedream", cwd=place)
    assert result.returncode == 0, result.stderr
    assert "Validation loss" in result.stdout
    assert {"config.json", "metrics.jsonl", "loss.png", "summary.json", "sample.txt"} <= {
        path.name for path in (place / "runs" / "pipedream").iterdir()
    }


def test_recomputation_changes_no_loss(place: Path) -> None:
    for name, extra in (("plain", ""), ("again", "--recompute"), ("low", "--autocast bfloat16")):
        assert main(f"train {SMALL} --dropout 0.1 --eval-every 1 --out {name} {extra}".split()) == 0
    plain, again, low = ((place / name / "metrics.jsonl").read_text() for name in ("plain", "again", "low"))
    assert losses_in(again) == losses_in(plain) != losses_in(low)
    assert losses_in(low) == pytest.approx(losses_in(plain), rel=0.02)


def losses_in(metrics: str) -> list[float]:
    found = (json.loads(line) for line in metrics.splitlines())
    return [one["validation_loss"] for one in found if "validation_loss" in one]


def test_an_output_that_nobody_reads_is_no_traceback(place: Path) -> None:
    result = subprocess.run(
        f'"{sys.executable}" -m nesterov_pp methods | true',
        shell=True,
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stderr == ""


@pytest.mark.parametrize("command", ["methods", f"train {SMALL} --sample-length 40 --out caf\u00e9"])
def test_what_standard_output_cannot_encode_ends_no_command(
    place: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(command.split()) == 0
    printed = raw.getvalue().decode("ascii")
    assert "+--" in printed
    assert "nesterov" in printed
    if command != "methods":
        assert "are in caf\\xe9." in printed


def test_an_output_that_cannot_be_written_is_one_sentence(place: Path) -> None:
    command = [sys.executable, "-m", "nesterov_pp", "info"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "nesterov_pp: error: standard output cannot be used: No space left on device\n"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"nesterov_pp {nesterov_pp.__version__}\n"


def test_a_folder_of_another_version_is_one_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"train {SMALL} --out runs/nesterov/seed-0".split()) == 0
    record = place / "runs/nesterov/seed-0/config.json"
    theirs = json.loads(record.read_text())
    capsys.readouterr()
    commands = [
        "train --resume --out runs/nesterov/seed-0",
        "reshard --run runs/nesterov/seed-0 --stages 1 --out new",
        f"compare {SMALL} --methods nesterov --seeds 0 --out runs --resume",
    ]
    for there in ({**theirs["config"], "new_setting": 1}, [], {"lr": 1}, {**theirs["config"], "lr": "fast"}):
        record.write_text(json.dumps({**theirs, "nesterov_pp": "9.9", "config": there}))
        before = snapshot(place)
        for command in commands:
            assert main(command.split()) == 2
            (sentence,) = capsys.readouterr().err.splitlines()
            assert "config.json" in sentence
            assert snapshot(place) == before
    record.write_text(json.dumps({**theirs, "nesterov_pp": "9.9"}))
    (record.parent / "summary.json").write_text("{}")
    assert main(commands[0].split()) == 2
    assert "summary.json is damaged or of another version" in capsys.readouterr().err
    (record.parent / "summary.json").unlink()
    assert main(commands[0].split()) == 0
    assert "Warning: this run was begun with nesterov_pp 9.9" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_usable(name: str) -> None:
    settings = {**COMPARED, **PRESETS[name]}
    settings.pop("planned_time", None)
    methods, seeds, rates = settings.pop("methods"), settings.pop("seeds"), settings.pop("lr")
    for method in methods:
        Config(method=method, seed=seeds[0], lr=rates[0], **settings).check()


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_shows_every_setting_with_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("--lr X", "peak learning rate (default: 0.001)", "--checkpoint-every X", "--resume", "--out DIR"):
        assert part in text


def test_methods_lists_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    listed = {cells[1].strip(): [cell.strip() for cell in cells] for cells in rows if cells[1].strip()}
    assert list(listed) == list(recipes())
    assert listed["nesterov"][3:9] == ["1", "P - i", "8", "28", "any", "both"]
    assert listed["nesterov-no-stash"][4] == "none"
    assert listed["gpipe"][3:5] == ["4", "none"]
    assert listed["xpipe"][5:8] == ["12", "32", "constant"]
    assert listed["basis-rotation"][5:7] == ["more", "more"]


def test_info_says_which_backends_are_available_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for part in (nesterov_pp.__version__, torch.__version__, f"{sys.version_info.major}.{sys.version_info.minor}"):
        assert part in printed
    for name, reason in available_backends().items():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"  {name} ")]
        assert line.split(maxsplit=2)[1] == ("no" if reason else "yes")
        assert reason is None or line.endswith(reason)


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ([], "selects cpu on the CPU, cuda on a GPU"),
        (["cuda"], "selects cpu on the CPU, triton on a GPU"),
        (["cuda", "triton"], "selects cpu on the CPU, reference on a GPU"),
        (["cuda", "triton", "cpu"], "selects reference on the CPU, reference on a GPU"),
    ],
)
def test_info_says_what_auto_takes(
    missing: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = [
        replace(b, unavailable=lambda b=b: "not here" if b.name in missing else None) for b in backend._REGISTRY
    ]
    monkeypatch.setattr(backend, "_REGISTRY", registry)
    monkeypatch.setattr("nesterov_pp.info.gpus", lambda: ["some GPU (sm_90, 139 GiB)"])
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert sentence in printed
    assert "some GPU (sm_90, 139 GiB)" in printed
    assert all(f"  {name:<11}no   not here" in printed for name in missing)


def test_info_needs_nothing_but_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("rich", "matplotlib", "scipy", "numpy"):
        monkeypatch.setitem(sys.modules, name, None)  # so that an import fails
    assert main(["info"]) == 0
    assert "backend=" in capsys.readouterr().out


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find_spec = importlib.util.find_spec

    def without_matplotlib(name: str, *rest: Any) -> Any:
        return None if name == "matplotlib" else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without_matplotlib)
    assert main(["train"]) == 2
    assert "needs matplotlib; run `pip install 'nesterov-pp[train]'`" in capsys.readouterr().err


def test_compare_is_not_for_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare"]) == 2
    assert "start it without torchrun" in capsys.readouterr().err
