"""Train with the Hugging Face ``Trainer`` and this library's optimizer: ``python examples/trainer.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import nesterov_pp as npp

TEXT = torch.tensor(list(Path(argparse.__file__).read_bytes()))
ROWS = [{"input_ids": tokens, "labels": tokens} for tokens in TEXT[: len(TEXT) // 64 * 64].view(-1, 64)]
SIZES = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}


def main() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    Trainer(
        model=AutoModelForCausalLM.from_config(config),
        args=TrainingArguments("runs/trainer", max_steps=100, logging_steps=25, use_cpu=True, report_to=[]),
        train_dataset=ROWS,
        optimizer_cls_and_kwargs=(npp.NAdam, {"lr": 3e-3, "weight_decay": 0.01, "decoupled_weight_decay": True}),
    ).train()


if __name__ == "__main__":
    main()
