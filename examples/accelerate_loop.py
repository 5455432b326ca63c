"""Train with Accelerate and this library's optimizer: ``accelerate launch examples/accelerate_loop.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoConfig, AutoModelForCausalLM

import nesterov_pp as npp

TEXT = torch.tensor(list(Path(argparse.__file__).read_bytes()))
ROWS = TensorDataset(TEXT[: len(TEXT) // 64 * 64].view(-1, 64))
SIZES = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    config = AutoConfig.for_model("qwen3", **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = npp.NAdam(model.parameters(), lr=3e-3, weight_decay=0.01, decoupled_weight_decay=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(ROWS, 8, shuffle=True))
    for step, (tokens,) in zip(range(1, 101), loader, strict=False):
        loss = model(tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
