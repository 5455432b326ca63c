"""The trained model of a run: its weights as one file, and the model and tokenizer that it is used with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nesterov_pp.pipeline.export import check_format, read_weights, write_weights
from nesterov_pp.pipeline.stage import autocasting
from nesterov_pp.pipeline.stage_state import as_saved_now
from nesterov_pp.training import checkpoint
from nesterov_pp.training.config import Config, RunError, UserError, derived_seed, recorded_settings, settle
from nesterov_pp.training.driver import stage_modules
from nesterov_pp.training.folder import RunFolder, is_fresh, make_folder, read_object
from nesterov_pp.training.model import layers_of, names_in_model
from nesterov_pp.training.sample import generate, printable
from nesterov_pp.training.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer

T = TypeVar("T")
WEIGHTS = "model.pt"
_FILES = (".pt", ".safetensors", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class TrainedModel:
    """A trained model in evaluation mode, with what it needs to read and write text."""

    model: nn.Sequential
    tokenizer: Tokenizer
    config: Config

    def continued(self, prompt: str, length: int, *, temperature: float | None = None, seed: int | None = None) -> str:
        """Return ``prompt`` and ``length`` tokens that continue it; control characters become U+FFFD.

        Args:
            prompt: text of at least one token.
            length: the number of tokens to draw.
            temperature: divides the logits (default: that of the run).
            seed: seed of the draws (default: that of the run, with which ``train`` draws its sample).

        Raises:
            UserError: the prompt has no tokens.
        """
        tokens = self.tokenizer.encode([prompt.encode("utf-8")]).long()
        if not len(tokens):
            raise UserError("--prompt must have at least one character")
        config = self.config
        drawn = generate(
            self.predict,
            tokens,
            length,
            context=config.context,
            temperature=config.temperature if temperature is None else temperature,
            seed=derived_seed("sample", config.seed if seed is None else seed),
        )
        return printable(self.tokenizer.decode(tokens.tolist() + drawn))

    @torch.no_grad()
    def predict(self, tokens: Tensor) -> Tensor:
        """Return the logits ``(batch, n, vocabulary)`` of ``(batch, n)`` int64 tokens, n <= context."""
        dtype = None if self.config.autocast is None else getattr(torch, self.config.autocast)
        with autocasting(self.model, dtype):
            logits: Tensor = self.model(tokens)
        return logits


def export(run: Path, out: Path | None = None) -> str:
    """Write the weights of a run's newest checkpoint as the state dict of the uncut model; return a message about it.

    The names are those of ``load(run).model``: ``0`` is the embedding, then come the blocks, and the last is the head.

    Args:
        run: the folder of a run, in one process or several, of any number of stages.
        out: a ``.pt`` or ``.safetensors`` file; or an empty or new folder, for the weights with the configuration and
            the tokenizer, which ``load`` takes (default: ``model.pt`` in the folder of the run).

    Raises:
        UserError: ``run`` holds no run or no checkpoint, ``out`` is not empty, or the format cannot be written.
        RunError: a file cannot be written.
    """
    record, config = _recorded(run)
    file, folder = run / WEIGHTS if out is None else out, None
    if file.suffix not in _FILES:
        if not is_fresh(file):
            raise UserError(f"{file} is not empty; give an empty or new folder with --out, or the name of a file")
        file, folder = file / WEIGHTS, file
    _explained(partial(check_format, file))
    microbatch, weights = _of_run(run, config)
    if folder is not None:
        make_folder(folder)
        checkpoint.write_text(RunFolder(folder).config, json.dumps(record, indent=2) + "\n")
        if RunFolder(run).tokenizer.exists():
            shutil.copyfile(RunFolder(run).tokenizer, RunFolder(folder).tokenizer)
    _explained(partial(write_weights, file, weights))
    count = sum(value.numel() for value in weights.values())
    return (
        f"{file} holds the weights of {run} after microbatch {microbatch}: {count:,} numbers in {len(weights)} tensors."
    )


def load(path: Path) -> TrainedModel:
    """Return the trained model in the folder of a run, a folder that ``export`` wrote, or a weights file in either.

    Raises:
        UserError: there is no such model, or its files do not belong together.
    """
    file = path if path.suffix in _FILES and not path.is_dir() else None
    folder = RunFolder(path if file is None else path.parent)
    if file is not None and not folder.config.exists():
        raise UserError(
            f"{folder.path} has no config.json, which describes the model of {file.name}; "
            "give the folder of the run, or export to a folder"
        )
    _, config = _recorded(folder.path)
    exported = folder.path / WEIGHTS
    if file is None and not checkpoint.newest_complete(folder.path) and exported.exists():
        file = exported
    if file is None:
        _, weights = _of_run(folder.path, config)
    else:
        weights = _explained(partial(read_weights, file))
    tokenizer: Tokenizer = ByteTokenizer() if config.tokenizer == "bytes" else BpeTokenizer.load(folder.tokenizer)
    model = whole_model(config, tokenizer.size)
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"{file or path} does not fit the model that {folder.config} describes") from None
    return TrainedModel(model.eval(), tokenizer, config)


def whole_model(config: Config, vocabulary: int) -> nn.Sequential:
    """Return the model of a run, uncut and as it was before training."""
    (model,) = stage_modules(replace(config, stages=1), vocabulary)
    assert isinstance(model, nn.Sequential)
    return model


def _recorded(run: Path) -> tuple[dict[str, Any], Config]:
    folder = RunFolder(run)
    if not folder.config.exists():
        runs = sorted(path.parent.name for path in run.glob("*/config.json"))
        hint = f"one of the runs in it, such as {run / runs[0]}" if runs else "the folder that train --out wrote to"
        raise UserError(f"{run} holds no run; give {hint}")
    try:
        record = read_object(folder.config)
    except UserError:
        record = {}
    if not isinstance(record.get("config"), dict):
        raise UserError(f"{folder.config} is damaged: it describes no run")
    return record, settle({}, recorded_settings(record, folder.config))


def _of_run(run: Path, config: Config) -> tuple[int, dict[str, Tensor]]:
    """Return the microbatches done and the stepped weights of the newest complete checkpoint, read file by file."""
    paths = checkpoint.newest_complete(run)
    if not paths:
        raise UserError(f"{run} holds no checkpoint that all of its stages have written")
    weights: dict[str, Tensor] = {}
    for path in paths:
        for i, stage in as_saved_now(checkpoint.load(path)["pipeline"])["stages"].items():
            layers = layers_of(config.stages, config.layers)[i]
            ring = stage["stash"]
            stepped = ring["shadow"] if config.recipe.shadow == "stepped" else ring["weights"][-1]
            weights.update(_renamed({**stepped, **stage["buffers"]}, layers))
    order = whole_model(config, len(weights["0.tokens.weight"])).state_dict()
    return checkpoint.microbatch_of(paths[0]), {name: weights[name] for name in order}


def _renamed(state: Mapping[str, Tensor], layers: list[int]) -> Iterable[tuple[str, Tensor]]:
    for (layer, rest), value in zip(names_in_model(state, layers), state.values(), strict=True):
        yield f"{layer}.{rest}", value.clone()  # a ring's versions share memory


def _explained(act: Callable[[], T]) -> T:
    try:
        return act()
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise RunError(str(error)) from None
