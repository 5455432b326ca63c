"""``export``: one state dict in the names of the uncut model, whose outputs are the pipeline's."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from export_worker import ENDING, METHODS, build_model, exported_alone
from launch import finish, start
from torch import nn
from torch.nn import functional as F

from nesterov_pp.pipeline import VirtualPipeline, cut
from nesterov_pp.pipeline.export import read_weights, write_weights

pytestmark = pytest.mark.usefixtures("one_thread")

HAS_SAFETENSORS = ENDING == ".safetensors"
WORKER = Path(__file__).parents[1] / "export_worker.py"


def trained(stages: Any, method: str = "xpipe", dtype: torch.dtype = torch.float32, **options: Any) -> VirtualPipeline:
    torch.manual_seed(1)
    pipe = VirtualPipeline(stages, F.mse_loss, method, lr=1e-2, **options)
    for _ in range(5 * pipe.microbatches_per_update):
        pipe.step(torch.randn(6, 8).to(dtype), torch.zeros(6, 8).to(dtype))
    return pipe


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_of_the_uncut_model(tmp_path: Path, method: str, dtype: torch.dtype, ending: str) -> None:
    if ending == ".safetensors":
        pytest.importorskip("safetensors")
    pipe = trained(build_model().to(dtype), method, dtype, partition=3)
    state = pipe.export(tmp_path / f"model{ending}")
    fresh = build_model().to(dtype)
    assert state is not None
    assert list(state) == list(fresh.state_dict())
    for loaded in (state, read_weights(tmp_path / f"model{ending}")):
        fresh.load_state_dict(loaded)
        inputs = torch.randn(4, 8).to(dtype)
        assert torch.equal(fresh.eval()(inputs), pipe.predict(inputs))
    assert [path.name for path in tmp_path.iterdir()] == [f"model{ending}"]


def test_a_file_holds_the_weights_alone(tmp_path: Path) -> None:
    """Ring slots lie side by side in memory, which a file must not take along."""
    torch.manual_seed(0)
    pipe = trained([nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8)) for _ in range(6)])
    pipe.export(tmp_path / "model.pt")
    size = sum(p.numel() * 4 for stage in pipe.stages for p in stage.parameters())
    assert size <= (tmp_path / "model.pt").stat().st_size < 2 * size


def test_it_is_a_copy() -> None:
    pipe = trained(build_model(), partition=2)
    state = pipe.export()
    assert state is not None
    before = {name: value.clone() for name, value in state.items()}
    for _ in range(4):
        pipe.step(torch.randn(6, 8), torch.zeros(6, 8))
    assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_the_names() -> None:
    def names(stages: Any, **options: Any) -> list[str]:
        pipe = VirtualPipeline(stages, F.mse_loss, partition=options.pop("partition", None))
        return list(pipe.export(**options) or {})

    def layers() -> OrderedDict[str, nn.Module]:
        return OrderedDict(embed=nn.Linear(2, 2), act=nn.Tanh(), head=nn.Sequential(nn.Linear(2, 2, bias=False)))

    whole = ["embed.weight", "embed.bias", "head.0.weight"]
    assert names(nn.Sequential(layers()), partition=2) == whole
    assert names(nn.Sequential(layers()), partition=1) == whole
    assert names(nn.Sequential(layers())) == whole  # every layer is a stage
    assert names(list(layers().values())) == ["0.weight", "0.bias", "2.0.weight"]
    pipe_of = [nn.Linear(2, 2), nn.Linear(2, 2)]
    assert names(pipe_of, names=lambda stage, name: f"h{stage}/{name}") == [
        *("h0/weight", "h0/bias"),
        *("h1/weight", "h1/bias"),
    ]
    with pytest.raises(ValueError, match="two entries of the stages are named 'weight'; give each its own with names="):
        names([nn.Linear(2, 2), nn.Linear(2, 2)], names=lambda _, name: name)


class Odd(nn.Module):
    """A model that only ``cut`` can cut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.full((8,), 0.5))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(4))
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        for block in self.blocks:
            x = block(x)
        y: torch.Tensor = self.head(x)
        return y


def test_a_cut_model_has_its_own_names() -> None:
    stages = cut(Odd(), 3, layers="blocks", before=lambda model, x: x * model.scale, after=["head"])
    pipe = trained(stages)
    state, fresh = pipe.export(), Odd()
    assert state is not None
    assert state.keys() == fresh.state_dict().keys()
    fresh.load_state_dict(state)
    inputs = torch.randn(4, 8)
    assert torch.equal(fresh.eval()(inputs), pipe.predict(inputs))
    assert all(torch.equal(value, state[name]) for stage in stages for name, value in stage.state_dict().items())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.again = nn.Linear(8, 8, bias=False)
        self.again.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.again(torch.tanh(self.first(x)))
        return y

    def get_extra_state(self) -> Any:
        return {"note": 1}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"note": 1}


def test_tied_weights_and_other_state(tmp_path: Path) -> None:
    pipe = trained([Tied(), nn.Linear(8, 8)])
    state = pipe.export(tmp_path / "model.pt")
    assert state is not None
    assert state["0.first.weight"] is state["0.again.weight"]
    nn.Sequential(Tied(), nn.Linear(8, 8)).load_state_dict(read_weights(tmp_path / "model.pt"))
    pytest.importorskip("safetensors")
    with pytest.raises(ValueError, match=r"0\._extra_state is not a tensor, so it cannot be in a \.safetensors file"):
        pipe.export(tmp_path / "model.safetensors")
    del state["0._extra_state"]
    write_weights(tmp_path / "model.safetensors", state)
    assert torch.equal(read_weights(tmp_path / "model.safetensors")["0.again.weight"], state["0.first.weight"])


def test_files_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = trained([nn.Linear(8, 8)])
    with pytest.raises(ValueError, match=r"model\.onnx ends neither in \.pt nor in \.safetensors"):
        pipe.export(tmp_path / "model.onnx")
    (tmp_path / "file").write_text("")
    for name in ("model.pt", "model.safetensors")[: 1 + HAS_SAFETENSORS]:
        with pytest.raises(OSError, match=rf"file/{name} cannot be written: Not a directory"):
            pipe.export(tmp_path / "file" / name)
    (tmp_path / "file").unlink()
    with pytest.raises(ValueError, match=r"model\.pt does not exist"):
        read_weights(tmp_path / "model.pt")
    (tmp_path / "model.pt").write_text("text")
    with pytest.raises(ValueError, match=r"model\.pt is damaged, or holds no exported weights"):
        read_weights(tmp_path / "model.pt")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs the package safetensors; install it, or give a name ending in \.pt"):
        pipe.export(tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.fixture(scope="module")
def across_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    results = finish(start([str(WORKER), str(folder)], 3), timeout=120)
    assert [status for status, _ in results] == [0, 0, 0], results
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_across_processes(across_processes: Path, method: str, dtype: str) -> None:
    found = torch.load(across_processes / f"{method}-{dtype}.pt", weights_only=True)
    fresh = build_model().to(getattr(torch, dtype))
    fresh.load_state_dict(found["state"])
    assert torch.equal(fresh.eval()(found["inputs"]), found["outputs"])
    assert found["others"] == [None, None]
    written = read_weights(across_processes / f"{method}-{dtype}-weights{ENDING}")
    assert all(torch.equal(value, found["state"][name]) for name, value in written.items())
    if dtype == "float32":
        wanted = exported_alone(method)
        assert list(found["state"]) == list(wanted)
        weights = [name for name in wanted if "running" not in name and "tracked" not in name]
        assert all(torch.equal(wanted[name], found["state"][name]) for name in weights)
