"""The settings of a run: their defaults, their ranges, and which of them must agree for a run to be resumed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from nesterov_pp.kernels import BACKENDS
from nesterov_pp.pipeline import Recipe, find_recipe

CORRECTION_SHARE = 0.14
"""T of Eq. 13 (arXiv 2505.01099) as a share of a run's updates: the paper's 7,000 of 50,000."""

FINAL_LR = 0.1
"""The fraction of the peak learning rate that the cosine leaves at the end of a run."""

FREE = ("data", "checkpoint_every", "diagnostics", "sample_length", "temperature", "timeout")
"""Settings that may change when a run is resumed: no loss depends on them (the data's content is checked instead)."""


class UserError(Exception):
    """An error that the user can fix. The message is one sentence; ``status`` is the exit status."""

    one_sentence = True
    status = 2


class RunError(UserError):
    """An error in a run that began correctly and cannot continue."""

    status = 1


def _whole(at_least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = at_least - 1
        if value < at_least:
            raise ValueError(f"needs a whole number of at least {at_least}, not {text!r}")
        return value

    return parse


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise ValueError(f"needs a number above 0, not {text!r}")
    return value


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < 1.0:
        raise ValueError(f"needs a number from 0 to below 1, not {text!r}")
    return value


def _choice(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"needs one of {', '.join(names)}, not {text!r}")
        return text

    return parse


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(f"needs yes or no, not {text!r}")
    return text == "yes"


def _option(default: Any, parse: Callable[[str], Any], help_text: str) -> Any:
    return field(default=default, metadata={"parse": parse, "help": help_text})


@dataclass(frozen=True)
class Config:
    """Settings of one run. Each is a command-line flag; ``None`` means "none" or "never"."""

    method: str = _option("nesterov", str, "training method, a name from `python -m nesterov_pp methods`")
    stages: int = _option(8, _whole(1), "number of pipeline stages")
    microbatches: int = _option(2000, _whole(1), "length of the run, in microbatches")
    seed: int = _option(0, _whole(0), "seed for initialization, data order and dropout")
    data: str | None = _option(
        None, str, "text file, or folder of text files, to train on (default: the Python standard library's source)"
    )
    tokenizer: str = _option(
        "bytes", _choice("bytes", "bpe"), "bytes: one token per byte; bpe: a byte-level BPE trained on the data"
    )
    vocab_size: int = _option(
        1024, _whole(257), "vocabulary size, in tokens; training uses it with --tokenizer bpe only"
    )
    layers: int = _option(8, _whole(1), "number of transformer blocks, divided among the stages")
    width: int = _option(64, _whole(1), "width of the residual stream, the model dimension")
    heads: int = _option(4, _whole(1), "number of attention heads in each block")
    context: int = _option(64, _whole(1), "sequence length, in tokens")
    batch: int = _option(8, _whole(1), "number of sequences in a microbatch")
    dropout: float = _option(0.0, _probability, "dropout probability")
    lr: float = _option(1e-3, _positive, "peak learning rate")
    embedding_lr: float = _option(1.0, _positive, "factor of --lr for the token and position embeddings")
    warmup: int = _option(
        100, _whole(0), "length of the linear warm-up, in microbatches; a cosine decay to a tenth of --lr follows"
    )
    delays: str | None = _option(
        None,
        str,
        "delays of the stages, in updates: 3,2,1,0 (one per stage), uniform:0-4, geometric:2.5, trace:FILE or own, "
        "optionally followed by +stragglers:0.1:5 or +dropouts:0.05 (default: own, the method's delays)",
    )
    flush_every: int | None = _option(None, _whole(1), "drain the pipeline after every X updates (default: never)")
    max_grad_norm: float | None = _option(
        None, _positive, "clip the gradient norm of each stage to X (default: no clipping)"
    )
    eval_every: int = _option(100, _whole(1), "interval between validations, in microbatches")
    eval_batches: int = _option(
        16, _whole(1), "number of batches in a validation, evenly spaced over the validation text"
    )
    checkpoint_every: int = _option(500, _whole(1), "interval between checkpoints, in updates")
    diagnostics: int | None = _option(
        None,
        _whole(1),
        "every X updates, measure how well each late stage's look-ahead points where its weights will go "
        "(default: never)",
    )
    sample_length: int = _option(300, _whole(0), "length of the text generated at the end, in tokens")
    temperature: float = _option(0.8, _positive, "sampling temperature for the generated text")
    threads: int = _option(1, _whole(1), "CPU threads per process; more than one pays off in wide models only")
    replicas: int = _option(
        1, _whole(1), "number of processes that share the work of each stage, each with its own microbatches"
    )
    timeout: float = _option(60.0, _positive, "time that processes wait for each other before they give up, in seconds")
    recompute: bool = _option(
        False, _yes_or_no, "save memory by running a stage's forward again before its backward (default: no)"
    )
    autocast: str | None = _option(
        None, _choice("bfloat16"), "dtype to compute in, with float32 weights: bfloat16 (default: no autocast)"
    )
    device: str = _option(
        "cpu", _choice("cpu", "cuda"), "device of the model, cpu or cuda; a virtual pipeline uses one GPU"
    )
    backend: str = _option("auto", _choice(*BACKENDS), f"backend of the optimizer step: {', '.join(BACKENDS)}")

    @property
    def recipe(self) -> Recipe:
        """The recipe of the method (UserError if the method is unknown)."""
        try:
            return find_recipe(self.method)
        except ValueError as error:
            raise UserError(str(error)) from None

    @property
    def microbatches_per_update(self) -> int:
        return self.recipe.accumulation(self.stages)

    @property
    def updates(self) -> int:
        return self.microbatches // self.microbatches_per_update

    def check(self) -> None:
        """Raise UserError if settings contradict each other, the method is unknown, or the device is not available."""
        k = self.microbatches_per_update
        try:
            self.recipe.check_forward(recompute=self.recompute, autocast=self.autocast is not None)
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda needs a GPU, but torch finds none; omit it to train on the CPU")
        if self.layers < self.stages:
            raise UserError(
                f"{self.layers} layers cannot fill {self.stages} stages; use --layers of at least {self.stages}, "
                f"or --stages of at most {self.layers}"
            )
        if self.width % self.heads:
            raise UserError(
                f"--width must be a multiple of --heads, but {self.width} is not a multiple of {self.heads}"
            )
        if self.microbatches % k:
            raise UserError(
                f"{self.method} updates every {k} microbatches, so --microbatches must be a multiple of {k}, "
                f"not {self.microbatches}"
            )

    def learning_rate(self, microbatch: int) -> float:
        """Return the learning rate of a microbatch (from 0): linear warm-up, then a cosine to a tenth.

        It is the same for every method.
        """
        if microbatch < self.warmup:
            return self.lr * (microbatch + 1) / self.warmup
        done = (microbatch - self.warmup) / max(1, self.microbatches - self.warmup)
        return self.lr * (FINAL_LR + (1.0 - FINAL_LR) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0))))

    def overrides(self) -> dict[str, Any]:
        """Return the hyper-parameters of the recipe that depend on the length of the run."""
        if self.recipe.correction_updates is None:
            return {}
        return {"correction_updates": max(1, round(CORRECTION_SHARE * self.updates))}

    def flags(self) -> list[str]:
        """Return the command-line flags that give this configuration."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return [part for name, value in values.items() for part in (flag(name), _as_text(value))]


def flag(name: str) -> str:
    """Return the command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def _as_text(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def settle(given: Mapping[str, Any], recorded: Mapping[str, Any] | None) -> Config:
    """Return the configuration of a run: the given settings, else those of the run to resume, else the defaults.

    Raises:
        UserError: a given setting differs from that of the run to resume, or another version made that run.
    """
    if recorded is None:
        return Config(**given)
    if set(recorded) != {f.name for f in fields(Config)}:
        raise UserError("this run was made by another version of nesterov_pp; give another --out")
    for name, value in given.items():
        if name not in FREE and recorded[name] != value:
            raise UserError(differs(flag(name), recorded[name], value))
    return Config(**{**recorded, **given})


def differs(what: str, there: object, here: object) -> str:
    """Return the error message for a run that cannot be resumed because a setting differs."""
    was = "unset" if there is None else there
    return f"this run has {what} {was}, not {here}; omit the flag to resume the run, or give another --out"


def derived_seed(*parts: object) -> int:
    """Return a seed that depends on ``parts`` alone and is unrelated to the seed of any other parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
