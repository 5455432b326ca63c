"""Every setting of a run: its default, its range, and what has to agree for a run to go on."""

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
"""What the cosine leaves of the learning rate at the end of a run."""

FREE = ("data", "checkpoint_every", "diagnostics", "sample_length", "temperature", "timeout")
"""Settings that may differ when a run goes on: no loss depends on them (the data's content is checked instead)."""


class UserError(Exception):
    """Something the user can put right. The message is one sentence; ``status`` is the exit status."""

    status = 2


class RunError(UserError):
    """A run that began well and cannot go on."""

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
    """Settings of one run. Each is a flag of the command line; ``None`` stands for "none" or "never"."""

    method: str = _option("nesterov", str, "a name from `python -m nesterov_pp methods`")
    stages: int = _option(8, _whole(1), "pipeline stages")
    microbatches: int = _option(2000, _whole(1), "length of the run")
    seed: int = _option(0, _whole(0), "of the first weights, the order of the data, and dropout")
    data: str | None = _option(None, str, "a text file, or a folder of them; default: Python's standard library")
    tokenizer: str = _option("bytes", _choice("bytes", "bpe"), "bytes, or a byte-level BPE trained on the data")
    vocab_size: int = _option(1024, _whole(257), "size of a BPE's vocabulary")
    layers: int = _option(8, _whole(1), "transformer blocks, spread over the stages")
    width: int = _option(64, _whole(1), "width of the residual stream")
    heads: int = _option(4, _whole(1), "attention heads")
    context: int = _option(64, _whole(1), "tokens in a sequence")
    batch: int = _option(8, _whole(1), "sequences in a microbatch")
    dropout: float = _option(0.0, _probability, "dropout probability")
    lr: float = _option(1e-3, _positive, "peak learning rate")
    warmup: int = _option(100, _whole(0), "microbatches of linear warm-up, before the cosine to a tenth")
    delays: str | None = _option(
        None, str, "other delays than the method's: 3,2,1,0 or uniform:0-4 or geometric:2.5 or trace:FILE, ..."
    )
    flush_every: int | None = _option(None, _whole(1), "drain the pipeline every so many updates; default: never")
    max_grad_norm: float | None = _option(None, _positive, "clip each stage's gradient norm; default: no clipping")
    eval_every: int = _option(100, _whole(1), "microbatches between validations")
    eval_batches: int = _option(16, _whole(1), "batches of validation text, evenly spaced in it")
    checkpoint_every: int = _option(500, _whole(1), "updates between checkpoints")
    diagnostics: int | None = _option(
        None, _whole(1), "measure every so many updates where each late stage's look-ahead points; default: never"
    )
    sample_length: int = _option(300, _whole(0), "tokens of text to write at the end")
    temperature: float = _option(0.8, _positive, "of that text")
    threads: int = _option(1, _whole(1), "threads; more than one pays for wide models only")
    replicas: int = _option(1, _whole(1), "processes that share each stage's work, each with microbatches of its own")
    timeout: float = _option(60.0, _positive, "seconds that processes wait for each other before they give up")
    recompute: bool = _option(False, _yes_or_no, "run a stage's forward again before its backward, to save memory")
    autocast: str | None = _option(None, _choice("bfloat16"), "compute in this dtype, with float32 weights")
    device: str = _option("cpu", _choice("cpu", "cuda"), "where the model is; a virtual pipeline fits on one GPU")
    backend: str = _option("auto", _choice(*BACKENDS), "backend of the optimizer step")

    @property
    def recipe(self) -> Recipe:
        """Raises: UserError: the method is unknown."""
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
        """Raises: UserError: two settings contradict each other, or the method is unknown."""
        k = self.microbatches_per_update
        try:
            self.recipe.check_forward(recompute=self.recompute, autocast=self.autocast is not None)
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda needs a GPU, and torch finds none; leave it out to train on the CPU")
        if self.layers < self.stages:
            raise UserError(
                f"{self.layers} layers cannot fill {self.stages} stages; use --layers of at least {self.stages}, "
                f"or --stages of at most {self.layers}"
            )
        if self.width % self.heads:
            raise UserError(f"--width must be a multiple of --heads: {self.width} is not one of {self.heads}")
        if self.microbatches % k:
            raise UserError(
                f"{self.method} updates every {k} microbatches, so --microbatches must be a multiple of {k}, "
                f"not {self.microbatches}"
            )

    def learning_rate(self, microbatch: int) -> float:
        """Of a microbatch (from 0): linear warm-up, then a cosine to a tenth. The same for every method."""
        if microbatch < self.warmup:
            return self.lr * (microbatch + 1) / self.warmup
        done = (microbatch - self.warmup) / max(1, self.microbatches - self.warmup)
        return self.lr * (FINAL_LR + (1.0 - FINAL_LR) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0))))

    def overrides(self) -> dict[str, Any]:
        """Hyper-parameters of the recipe that depend on the length of the run."""
        if self.recipe.correction_updates is None:
            return {}
        return {"correction_updates": max(1, round(CORRECTION_SHARE * self.updates))}

    def flags(self) -> list[str]:
        """The command-line flags that give this configuration."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return [part for name, value in values.items() for part in (flag(name), _as_text(value))]


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def _as_text(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def settle(given: Mapping[str, Any], recorded: Mapping[str, Any] | None) -> Config:
    """The configuration of a run: what was given, else what the run that goes on has, else the defaults.

    Raises:
        UserError: what was given is not what the run to go on has.
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
    """The sentence for a run that cannot go on because a setting is another one."""
    was = "unset" if there is None else there
    return f"this run has {what} {was}, not {here}: leave the flag out to go on, or give another --out"


def derived_seed(*parts: object) -> int:
    """A seed that is a function of ``parts`` alone, and unrelated to that of any other parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
