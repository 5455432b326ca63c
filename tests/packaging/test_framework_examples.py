"""The examples for Hugging Face run as they are: ``pip install '.[frameworks]'``."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import warnings
from types import ModuleType

import pytest
import torch
from launch import ROOT, environment, finish, free_port, start

import nesterov_pp as npp

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # from transformers
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def transformers() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("accelerate")
        return pytest.importorskip("transformers", minversion="5")


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(printed: str) -> list[str]:
    return re.findall(r"(?<!_)loss'?:? '?([\d.]+)", printed)


@pytest.mark.parametrize("name", ["hf", "trainer", "accelerate_loop"])
def test_it_is_short(name):
    main = (EXAMPLES / f"{name}.py").read_text().split("def main() -> None:\n")[1].split("\n\n")[0]
    assert len(main.splitlines()) <= 18


def test_the_pipeline_of_two_processes_is_the_virtual_one(tmp_path, monkeypatch, transformers):
    monkeypatch.chdir(tmp_path)
    (first, printed), (second, more) = finish(start([str(EXAMPLES / "hf.py")], 2), timeout=300)
    assert (first, second) == (0, 0), printed + more
    found = losses(printed + more)
    example = loaded("hf")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(example.config())
    pipe = npp.pipeline.VirtualPipeline(
        npp.pipeline.cut(model, 2, untie=True), npp.pipeline.causal_lm_loss, lr=3e-3, seed=0
    )
    virtual = [float(pipe.step(*example.batch(m))) for m in range(example.UPDATES)]
    assert found == [f"{virtual[m - 1]:.3f}" for m in range(example.EVERY, example.UPDATES + 1, example.EVERY)]
    assert virtual[-1] < 0.6 * virtual[0]


@pytest.mark.parametrize("name", ["trainer", "accelerate_loop"])
def test_training_with_the_optimizer(name, tmp_path):
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path,
        env=environment(0, 1, free_port()),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = [float(loss) for loss in losses(ran.stdout)]
    assert len(found) == 4
    assert found[-1] < 0.8 * found[0]
