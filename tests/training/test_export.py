"""The trained model of a run: exported, loaded again, and writing text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import finish, start

from nesterov_pp.cli import main
from nesterov_pp.pipeline.export import read_weights
from nesterov_pp.training import checkpoint
from nesterov_pp.training.export import export, load, whole_model
from nesterov_pp.training.trainer import train

PROMPT = 16  # tokens that the sample of a run with this context continues


def trained(text_file: Path, out: Path, **more: Any) -> Path:
    model = {"stages": 3, "layers": 4, "width": 16, "heads": 2, "context": PROMPT, "batch": 4}
    run = {"microbatches": 30, "warmup": 5, "eval_every": 30, "eval_batches": 2, "sample_length": 24}
    train({"data": str(text_file), **model, **run, **more}, out)
    return out


@pytest.fixture(scope="module")
def run(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run whose forwards ran at predicted weights."""
    return trained(text_file, tmp_path_factory.mktemp("run") / "xpipe", method="xpipe", dropout=0.1)


def prompt_and_sample(run: Path) -> tuple[str, str]:
    sample = (run / "sample.txt").read_text()[:-1]
    return sample[:PROMPT], sample


def test_generating_goes_on_as_the_sample_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, sample = prompt_and_sample(run)
    assert main(["generate", str(run), "--prompt", prompt, "--length", "24"]) == 0
    assert capsys.readouterr().out == sample + "\n"
    for more in (["--seed", "5"], ["--temperature", "9"]):
        assert main(["generate", str(run), "--prompt", prompt, "--length", "24", *more]) == 0
        assert capsys.readouterr().out != sample + "\n"
    assert main(["generate", str(run)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("\n")
    assert 100 < len(text) <= 1 + 200 + 1


@pytest.mark.parametrize("name", ["", "weights.pt", "weights.safetensors", "folder"])
def test_what_is_exported_is_the_model(
    run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    out = tmp_path / name if name else run / "model.pt"
    assert main(["export", str(run), *(["--out", str(out)] if name else [])]) == 0
    file = out / "model.pt" if name == "folder" else out
    assert capsys.readouterr().out.startswith(f"{file} holds the weights of {run} after microbatch 30: ")
    weights = read_weights(file)
    found = load(run)
    assert all(torch.equal(value, weights[key]) for key, value in found.model.state_dict().items())
    model = whole_model(found.config, 256)
    model.load_state_dict(weights)
    tokens = torch.arange(PROMPT)[None]
    assert torch.equal(model.eval()(tokens), found.predict(tokens))
    if name in ("", "folder"):
        prompt, sample = prompt_and_sample(run)
        for path in (out, file):
            assert load(path).continued(prompt, 24) == sample


def test_a_run_in_several_processes(text_file: Path, tmp_path: Path) -> None:
    """With a ring that holds predictions, a tokenizer of its own, and bfloat16."""
    flags = {
        **{"method": "one-step-ef", "tokenizer": "bpe", "vocab-size": 270, "autocast": "bfloat16", "layers": 3},
        **{"width": 16, "heads": 2, "context": PROMPT, "batch": 4, "microbatches": 8, "sample-length": 12},
        **{"eval-batches": 1, "warmup": 2, "data": text_file, "out": tmp_path / "run"},
    }
    command = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    outputs = finish(start(["-m", "nesterov_pp", "train", *command], 2), timeout=120)
    assert [status for status, _ in outputs] == [0, 0], outputs
    export(tmp_path / "run", tmp_path / "alone")
    for folder in ("run", "alone"):
        found = load(tmp_path / folder)
        sample = (tmp_path / "run" / "sample.txt").read_text()[:-1]
        text = text_file.read_bytes()
        prompt = found.tokenizer.decode(found.tokenizer.encode([text[int(len(text) * 0.9) :]])[:PROMPT].tolist())
        assert sample.startswith(prompt)
        assert found.continued(prompt, 12) == sample
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == ["config.json", "model.pt", "tokenizer.json"]


def test_bad_requests_are_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: object) -> str:
        assert main([str(a) for a in arguments]) == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        return sentence

    empty, runs, bare, full = (tmp_path / name for name in ("empty", "runs", "bare", "full"))
    for folder in (empty, runs / "one", bare, full):
        folder.mkdir(parents=True)
    (full / "file").write_text("")
    record = json.loads((run / "config.json").read_text())
    for folder in (runs / "one", bare):
        (folder / "config.json").write_text(json.dumps(record))
    for command in ("export", "generate"):
        assert refused(command, empty).endswith(f"{empty} holds no run; give the folder that train --out wrote to")
        assert "holds no run" in refused(command, tmp_path / "nowhere")
        assert refused(command, runs).endswith(f"holds no run; give one of the runs in it, such as {runs / 'one'}")
        assert "bare holds no checkpoint that all of its stages have written" in refused(command, bare)
    assert "full is not empty; give an empty or new folder with --out, or the" in refused("export", run, "--out", full)
    assert "model.bin ends neither in .pt nor in .safetensors" in refused("export", run, "--out", "model.bin")
    assert "--prompt must have at least one character" in refused("generate", run, "--prompt", "")

    weights = tmp_path / "weights.pt"
    export(run, weights)
    assert f"{tmp_path} has no config.json, which describes the model of weights.pt" in refused("generate", weights)
    (bare / "config.json").write_text(json.dumps({**record, "config": {**record["config"], "width": 32}}))
    weights.rename(bare / "weights.pt")
    assert "weights.pt does not fit the model that" in refused("generate", bare / "weights.pt")
    (bare / "model.pt").write_text("text")
    assert "model.pt is damaged, or holds no exported weights" in refused("generate", bare)
    for content in ("{}", "{"):
        (bare / "config.json").write_text(content)
        assert "config.json is damaged: it describes no run" in refused("export", bare)
    (newest, *_) = reversed(checkpoint.checkpoints(run))
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-50])
    try:
        assert "is truncated or damaged" in refused("export", run, "--out", tmp_path / "new")
    finally:
        newest.write_bytes(whole)
    assert not (tmp_path / "new").exists()


def test_a_run_of_another_version_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((run / "config.json").read_text())
    record["config"]["new_setting"] = 1
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert main(["export", str(tmp_path)]) == 2
    assert "was written by another version of nesterov_pp" in capsys.readouterr().err


def test_a_run_in_bfloat16_generates_in_bfloat16(text_file: Path, tmp_path: Path) -> None:
    out = trained(text_file, tmp_path / "low", weights_dtype="bfloat16", master_weights=True)
    found = load(out)
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    prompt, sample = prompt_and_sample(out)
    assert found.continued(prompt, 24) == sample
