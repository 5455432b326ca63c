"""A swarm's run of ``train``'s model: its record, its task, and what is written at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nesterov_pp
from nesterov_pp.pipeline.export import write_weights
from nesterov_pp.swarm.task import Task, check_recipe
from nesterov_pp.swarm.trace import weights_of
from nesterov_pp.training import checkpoint
from nesterov_pp.training.config import Config, UserError
from nesterov_pp.training.data import Corpus, read_text, tokenize
from nesterov_pp.training.driver import mean, pipeline_options, stage_modules
from nesterov_pp.training.export import WEIGHTS, whole_model
from nesterov_pp.training.folder import RunFolder
from nesterov_pp.training.model import layers_of, names_in_model, next_token_loss
from nesterov_pp.training.tokenizer import ByteTokenizer

SETTINGS = (
    "method",
    "stages",
    "microbatches",
    "seed",
    "data",
    "layers",
    "width",
    "heads",
    "context",
    "batch",
    "dropout",
    "lr",
    "embedding_lr",
    "weight_decay",
    "betas",
    "no_decay",
    "warmup",
    "max_grad_norm",
    "eval_batches",
    "threads",
    "backend",
)
"""The settings of ``train`` that a swarm has."""


def corpus_of(config: Config) -> tuple[Corpus, str]:
    """Return the tokens of a run, bytes of its text, and the digest of the text. Raises UserError."""
    text = read_text(config.data)
    return tokenize(text, ByteTokenizer(), config.context), text.digest


def record_of(config: Config, versions: int, digest: str) -> dict[str, Any]:
    """Return what the processes of a run must agree on, as JSON.

    Raises:
        UserError: the settings contradict each other, or a swarm cannot train with the method.
    """
    config.check()
    try:
        check_recipe(config.own_recipe, config.stages)
    except ValueError as error:
        raise UserError(str(error)) from None
    return {
        "nesterov_pp": nesterov_pp.__version__,
        "torch": torch.__version__,
        "config": {**asdict(config), "data": None if config.data is None else str(Path(config.data).resolve())},
        "versions": versions,
        "data_digest": digest,
    }


def config_of(record: Mapping[str, Any]) -> Config:
    """Return the settings in a record that arrived or was read.

    Raises:
        UserError: it is that of another version, or a setting is malformed.
    """
    try:
        config = Config(**record["config"])
        config.check()
    except (KeyError, TypeError, ValueError):
        raise UserError("the record of this run is malformed, or that of another version of nesterov_pp") from None
    if record.get("nesterov_pp") != nesterov_pp.__version__:
        raise UserError(
            f"the run is one of nesterov_pp {record.get('nesterov_pp')}, not {nesterov_pp.__version__}; install that"
        )
    return config


def task_of(record: Mapping[str, Any], data: str | None = None) -> Task:
    """Return the task of a run.

    Args:
        record: what ``record_of`` returned.
        data: where this machine has the run's text (default: where the coordinator has it).

    Raises:
        UserError: the record is malformed, or the text is not that of the run.
    """
    config = config_of(record)
    corpus, digest = corpus_of(config if data is None else replace(config, data=data))
    if digest != record.get("data_digest"):
        raise UserError("the text here is not that of the run; name it with --data")
    torch.set_num_threads(config.threads)
    options = pipeline_options(config)

    def batch(m: int) -> tuple[Tensor, Tensor]:
        return corpus.batch(config.seed, m, config.batch, config.context)

    return Task(
        recipe=config.own_recipe,
        stages=config.stages,
        build=lambda stage: stage_modules(config, ByteTokenizer().size)[stage],
        loss_fn=next_token_loss,
        batch=batch,
        rate=lambda counted: config.learning_rate(min(counted, config.microbatches - 1)),
        boundary=(config.batch, config.context, config.width),
        seed=config.seed,
        versions=int(record["versions"]),
        max_grad_norm=config.max_grad_norm,
        param_groups=options["param_groups"],
        backend=config.backend,
    )


@torch.no_grad()
def finish(out: Path, config: Config, states: Sequence[Mapping[str, Any]], corpus: Corpus) -> float:
    """Write the weights of all stages as the state dict of the uncut model; return the validation loss."""
    weights: dict[str, Tensor] = {}
    for s, state in enumerate(states):
        names = names_in_model(weights_of(state), layers_of(config.stages, config.layers)[s])
        for (layer, rest), value in zip(names, weights_of(state).values(), strict=True):
            weights[f"{layer}.{rest}"] = value
    model = whole_model(config, ByteTokenizer().size)
    model.load_state_dict(weights)
    write_weights(out / WEIGHTS, model.state_dict())
    model.eval()
    batches = corpus.validation_batches(config.eval_batches, config.batch, config.context)
    return mean([float(next_token_loss(model(inputs), targets)) for inputs, targets in batches])


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    checkpoint.write_text(RunFolder(out).config, json.dumps(record, indent=2) + "\n")
