"""Train a Hugging Face model as an asynchronous pipeline: ``torchrun --nproc-per-node 4 examples/hf.py``.

Each process trains one stage and writes a checkpoint every 50 updates, from which ``torchrun --max-restarts 3``
resumes. Data are the bytes of a source file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import nesterov_pp as npp

UPDATES, EVERY, FOLDER = 200, 50, "runs/hf"
TEXT = torch.tensor(list(Path(argparse.__file__).read_bytes()))


def batch(m: int) -> tuple[Tensor, Tensor]:
    """Return microbatch ``m``, the same on every call: tokens, and the same tokens as labels."""
    starts = torch.randint(len(TEXT) - 64, (8, 1), generator=torch.Generator().manual_seed(m))
    tokens = TEXT[starts + torch.arange(64)]
    return tokens, tokens


def config() -> PretrainedConfig:
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6}
    return AutoConfig.for_model("qwen3", **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16)


def main() -> None:
    torch.manual_seed(0)
    with npp.pipeline.connect(timeout=60) as world:
        stage = npp.pipeline.cut(AutoModelForCausalLM.from_config(config()), world.size, untie=True)[world.rank]
        pipe = npp.pipeline.AsyncPipeline(stage, npp.pipeline.causal_lm_loss, batch, UPDATES, world, lr=3e-3)
        pipe.resume(FOLDER)
        while pipe.updates < UPDATES:
            loss = pipe.step()
            pipe.save(FOLDER, every=EVERY)
            if pipe.updates % EVERY == 0 and loss is not None:
                print(f"update {pipe.updates}: loss {float(loss):.3f}, delays {pipe.delays}", flush=True)


if __name__ == "__main__":
    main()
