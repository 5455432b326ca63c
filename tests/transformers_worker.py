"""Tiny transformers models trained as strangers would, in one process or as one stage of several.

Usage: transformers_worker.py FOLDER KIND,... with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nesterov_pp.pipeline import AsyncPipeline, VirtualPipeline, causal_lm_loss, connect, cut, no_decay

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

UPDATES, K = 100, 2
KINDS = ("gpt2", "llama", "qwen2", "mistral")
SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "bos_token_id": 1}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 32, "tie_word_embeddings": True},
    "mistral": {"intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 4},
}
OTHERS = {"intermediate_size": 64, "num_key_value_heads": 2}
OPTIONS: dict[str, Any] = {
    "lr": 3e-3,
    "seed": 5,
    "microbatches_per_update": K,
    "max_grad_norm": 1.0,
    "clip_over": "pipeline",
    "weight_decay": 0.1,
    "param_groups": no_decay,
}


def stages(name: str, count: int) -> list[Any]:
    """Return a model's stages: with untied embeddings, dropout where it has some, and checkpointed layers.

    After ``-bf16``, weights in bfloat16, which get float32 masters.
    """
    kind, _, low = name.partition("-")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, eos_token_id=2, pad_token_id=0, **OWN.get(kind, OTHERS))
    config.use_cache = False
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    parts = cut(model.bfloat16() if low else model, count, untie=True)
    return [part.train() for part in parts]


def options(name: str) -> dict[str, Any]:
    return OPTIONS | ({"master_weights": True} if name.endswith("-bf16") else {})


def batch(m: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return a microbatch padded on the left to the longest of its sequences; padding is neither seen nor predicted."""
    draw = torch.Generator().manual_seed(m)
    rows = int(torch.randint(1, 5, (), generator=draw))
    lengths = torch.randint(3, 17, (rows, 1), generator=draw)
    longest = int(lengths.max())
    first = torch.randint(3, 90, (rows, 1), generator=draw)
    ids = 3 + (first + 7 * torch.arange(longest)) % 90
    mask = (torch.arange(longest) >= longest - lengths).long()
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids * mask, "attention_mask": mask}, labels


def loss_fn(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return causal_lm_loss(logits, labels, reduction="sum")


def expected(name: str, count: int) -> dict[str, Any]:
    pipe = VirtualPipeline(stages(name, count), loss_fn, **options(name))
    losses = [float(pipe.step(*batch(m))) for m in range(K * UPDATES)]
    return {"losses": losses, "weights": [stash.weights() for stash in pipe.stashes]}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2].split(",")
    torch.set_num_threads(1)
    with connect(timeout=120) as world:
        for name in names:
            stage = stages(name, world.size)[world.rank]
            pipe = AsyncPipeline(stage, loss_fn, batch, K * UPDATES, world, **options(name))
            losses = [float(loss) for _ in range(K * UPDATES) if (loss := pipe.step()) is not None]
            torch.save({"losses": losses, "weights": pipe.stash.weights()}, folder / f"{name}-{world.rank}.pt")


if __name__ == "__main__":
    main()
