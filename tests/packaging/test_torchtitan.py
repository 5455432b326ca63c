"""The examples for torchtitan, with torchtitan's own containers, schedules and checkpoints."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from launch import ROOT, finish, start

import nesterov_pp as npp

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # from torchtitan and torch.distributed
EXAMPLES = ROOT / "examples" / "torchtitan"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"titan_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def titan() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchtitan.models.llama3", reason="pip install '.[torchtitan]'")


@pytest.fixture(scope="module")
def example(titan) -> ModuleType:
    return loaded("pipeline")


@pytest.fixture(scope="module")
def rules(titan) -> ModuleType:  # once: torchtitan refuses to register an override twice
    return loaded("rules")


# ------------------------------------------------------------------ the pipeline


def test_the_pipeline_of_two_processes_is_the_virtual_one(example, tmp_path, monkeypatch):
    from torchtitan.components.optimizer import default_adamw

    monkeypatch.chdir(tmp_path)
    (first, printed), (second, more) = finish(start([str(EXAMPLES / "pipeline.py")], 2), timeout=300)
    assert (first, second) == (0, 0), printed + more
    stages = example.stages(example.model(), 2)
    pipe = npp.pipeline.VirtualPipeline(stages, example.loss, **example.OPTIONS)
    schedule = example.SCHEDULE.build(optimizers=pipe.optimizers, training_steps=example.UPDATES)
    losses = []
    for m in range(example.UPDATES):
        losses.append(float(pipe.step(*example.batch(m))))
        schedule.step()
    shown = [losses[m - 1] for m in range(example.EVERY, example.UPDATES + 1, example.EVERY)]
    assert re.findall(r"loss ([\d.]+)", printed + more) == [f"{loss:.3f}" for loss in shown]
    assert losses[-1] < 0.5 * losses[0]

    whole = Run(example, default_adamw(), tmp_path, initial_load_path=str(example.FOLDER.absolute()))
    assert whole.checkpointer.load()
    weights = whole.model.state_dict()  # torchtitan's names: wq, wk and wv, which are one parameter in training
    virtual = {name: value for stage in stages for name, value in stage.state_dict().items()}
    assert weights.keys() == virtual.keys()
    assert all(torch.equal(weights[name], virtual[name]) for name in virtual)


def test_the_stages_compute_what_the_model_does_also_with_packed_documents(example):
    from torchtitan.models.llama3 import model_registry

    config = model_registry("debugmodel", attn_backend="flex").model
    config.layers = config.layers[:2]
    for layer in config.layers:
        layer.attention.rope.max_seq_len = 128
    torch.manual_seed(0)
    model = config.build()
    model.init_weights()
    tokens, positions = torch.randint(256, (2, 128)), torch.cat([torch.arange(50), torch.arange(78)]).expand(2, 128)
    with torch.no_grad():  # torch's FlexAttention has no backward on a CPU
        whole = model(tokens, positions, model.get_attention_masks(positions))
        one_document = model(tokens, positions, model.get_attention_masks(torch.arange(128).expand(2, 128)))
        first, last = example.stages(model, 2)
        found = last(*first(input=tokens, positions=positions))
    assert torch.equal(found, whole)
    assert not torch.equal(found, one_document)


# ------------------------------------------------------------------ the optimizers


class Run:
    """What torchtitan's trainer builds around a model, and its step."""

    def __init__(self, example: ModuleType, optimizer: Any, folder: Path, **saving: Any) -> None:
        from torchtitan.components.checkpointer import CheckpointManager

        self.example, self.model = example, example.model()
        self.optimizers = optimizer.build(model_parts=[self.model])
        self.schedulers = example.SCHEDULE.build(optimizers=self.optimizers, training_steps=8)
        self.checkpointer = CheckpointManager.Config(enable=True, interval=4, keep_latest_k=0, **saving).build(
            dataloader=None,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,
            states={},
            sd_adapter=None,
            base_folder=str(folder),
        )

    def train(self, first: int, stop: int) -> None:
        for m in range(first, stop):
            self.optimizers.zero_grad()
            inputs, labels = self.example.batch(m)
            total, number = self.example.loss(self.model(inputs["input"], inputs["positions"]), labels)
            (total / number).backward()
            self.optimizers.step()
            self.schedulers.step()
            self.checkpointer.save(m + 1)

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.mark.parametrize(
    ("name", "rule", "options"), [("nadam", npp.NAdam, {}), ("rotated", npp.RotatedNAdam, {"block_size": 64})]
)
def test_a_run_goes_on_from_a_checkpoint_of_torchtitan(name, rule, options, rules, example, tmp_path):
    from torchtitan.components.optimizer import default_adamw

    optimizer = getattr(rules, name)(default_adamw(lr=1e-3), betas=[0.95, 0.99], **options)  # a list, as from JSON
    run = Run(example, optimizer, tmp_path)
    assert [type(o) for o in run.optimizers] == [rule]
    group = run.optimizers.optimizers[0].param_groups[0]
    assert (tuple(group["betas"]), group["weight_decay"]) == ((0.95, 0.99), 0.1)
    start = run.weights()
    run.train(0, 6)
    rates = run.schedulers.get_metrics()
    assert rates == pytest.approx({f"lr/{rule.__name__}": 1e-3 * 7 / 8})  # the warm-up that fits into 8 steps

    again = Run(example, optimizer, tmp_path)
    assert again.checkpointer.load()
    again.train(4, 6)
    assert again.schedulers.get_metrics() == rates
    assert all(map(torch.equal, again.weights(), run.weights()))
    assert not any(map(torch.equal, start, run.weights()))


def test_moments_in_bfloat16_and_other_optimizers_are_kept(rules):
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    weights = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    groups = [
        ParamGroupConfig(pattern="^0", optimizer_name="Adam", optimizer_kwargs={"lr": 1e-3}),
        ParamGroupConfig(pattern="^1", optimizer_name="Other", optimizer_kwargs={"lr": 1e-3}),
    ]
    config = OptimizersContainer.Config(param_groups=groups, implementation=rules.LOW_PRECISION)
    assert [g.optimizer_name for g in rules.nadam(config).param_groups] == ["NAdam", "Other"]
    config.param_groups[1].optimizer_name = "AdamW"
    (optimizer,) = rules.nadam(config).build(model_parts=[weights])
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="another implementation than fused_opt_states_bf16"):
        rules.rotated(config)
