"""Train a model of torchtitan as an asynchronous pipeline, one process for each stage:

    torchrun --nproc-per-node 2 examples/torchtitan/pipeline.py

The model, its loss, the learning rates and the format of the weights are torchtitan's; data are the bytes of a source
file.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import save
from torchtitan.components.loss import IGNORE_INDEX, CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import Llama3Model, model_registry

import nesterov_pp as npp

UPDATES, EVERY, FOLDER = 40, 10, Path("runs/torchtitan")
OPTIONS: dict[str, Any] = {"method": "nesterov", "lr": 1e-3, "max_grad_norm": 1.0, "clip_over": "pipeline"}
TEXT = torch.tensor(list(Path(argparse.__file__).read_bytes()))
SCHEDULE = LRSchedulersContainer.Config(warmup_steps=10, decay_ratio=0.5, decay_type="cosine", min_lr_factor=0.1)
CROSS_ENTROPY = CrossEntropyLoss.Config().build()


def batch(m: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return microbatch ``m``, the same on every call: what torchtitan's data loaders give, and the next tokens."""
    starts = torch.randint(len(TEXT) - 65, (4, 1), generator=torch.Generator().manual_seed(m))
    tokens = TEXT[starts + torch.arange(65)]
    return {"input": tokens[:, :-1], "positions": torch.arange(64).expand(4, 64)}, tokens[:, 1:]


def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return torchtitan's sum over tokens, and their number, by which an update divides it."""
    return CROSS_ENTROPY(logits, labels)[0], (labels != IGNORE_INDEX).sum()


def model() -> Llama3Model:
    config = model_registry("debugmodel").model
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # FlexAttention has no backward on a CPU
        layer.attention.rope.max_seq_len = 64
    torch.manual_seed(0)
    whole = config.build()
    whole.init_weights()
    return whole


def stages(whole: Llama3Model, number: int) -> list[npp.pipeline.StageModule]:
    """Cut any decoder of torchtitan. Stages hand on the hidden state and the positions, and make their own masks."""

    def before(model: Llama3Model, input: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return model.tok_embeddings(input), positions

    def each(model: Llama3Model, layer: nn.Module, hidden: Tensor, positions: Tensor) -> Any:
        plain = isinstance(model.config.first_attention.inner_attention, ScaledDotProductAttention.Config)
        return layer(hidden, None if plain else model.get_attention_masks(positions), positions)

    layers = [f"layers.{i}" for i in whole.layers]
    return npp.pipeline.cut(whole, number, layers=layers, before=before, each=each, after=["norm", "lm_head"])


def main() -> None:
    with npp.pipeline.connect(timeout=60) as world:
        stage = stages(model(), world.size)[world.rank]
        pipe = npp.pipeline.AsyncPipeline(stage, loss, batch, UPDATES, world, **OPTIONS)
        schedule = SCHEDULE.build(optimizers=[pipe.optimizer], training_steps=UPDATES)
        while pipe.updates < UPDATES:
            found = pipe.step()  # one microbatch: a forward, a backward and this stage's update
            schedule.step()
            if pipe.updates % EVERY == 0 and found is not None:
                print(f"update {pipe.updates}: loss {float(found):.3f}, delays {pipe.delays}", flush=True)
        save(stage.state_dict(), checkpoint_id=FOLDER)  # one checkpoint, to which each process adds its stage


if __name__ == "__main__":
    main()
