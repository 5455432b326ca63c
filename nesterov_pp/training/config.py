"""The settings of a run: their defaults, their ranges, and which of them must agree for a run to be resumed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import nesterov_pp
from nesterov_pp.kernels import BACKENDS
from nesterov_pp.optim.options import EIGHT_BIT, SPLIT
from nesterov_pp.pipeline import Placement, Recipe, find_recipe
from nesterov_pp.pipeline.stage import build_optimizer, build_stash
from nesterov_pp.stash import FORMS, OldVersions

CORRECTION_SHARE = 0.14
"""T of Eq. 13 (arXiv 2505.01099) as a share of a run's updates: the paper's 7,000 of 50,000."""

FINAL_LR = 0.1
"""The fraction of the peak learning rate that the cosine leaves at the end of a run."""

LATER = (
    "slack",
    "wire",
    "weight_decay",
    "betas",
    "no_decay",
    "weights_dtype",
    "state_dtype",
    "master_weights",
    "stochastic_rounding",
    "stash",
)
"""Settings that the first runs did not record, and had at what are their defaults now."""
LARGEST_SEED = 2**64 - 1
LARGEST_COUNT = 10**9 - 1
"""The largest number of microbatches, which names of checkpoints have room for, and of anything else."""

LARGEST = 1e30
"""The largest positive number, and the inverse of the smallest: float32 has room for products with either."""

_LONG = 40  # characters of a number that a message shows

FREE = ("data", "checkpoint_every", "diagnostics", "sample_length", "temperature", "timeout")
"""Settings that may change when a run is resumed: no loss depends on them (the data's content is checked instead)."""


class UserError(Exception):
    """An error that the user can fix. The message is one sentence; ``status`` is the exit status."""

    one_sentence = True
    status = 2


class RunError(UserError):
    """An error in a run that began correctly and cannot continue."""

    status = 1


def whole(at_least: int, at_most: int = LARGEST_COUNT) -> Callable[[str], int]:
    """Return a function that parses a whole number in a range, both ends included; it raises ValueError."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # not a number, or one of thousands of digits
            value = at_most + 1 if text.isdecimal() else at_least - 1
        if value < at_least:
            raise ValueError(f"needs a whole number of at least {at_least}, not {text!r}")
        if value > at_most:
            shown = text if len(text) < _LONG else f"{text[:_LONG]}..."
            raise ValueError(f"needs a whole number of at most {at_most}, not {shown!r}")
        return value

    return parse


def _positive(at_most: float = LARGEST) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0.0 < value < math.inf:
            raise ValueError(f"needs a number above 0, not {text!r}")
        if not 1.0 / LARGEST <= value <= at_most:
            raise ValueError(f"needs a number from {1.0 / LARGEST:g} to {at_most:g}, not {text!r}")
        return value

    return parse


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < 1.0:
        raise ValueError(f"needs a number from 0 to below 1, not {text!r}")
    return value


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < math.inf:
        raise ValueError(f"needs a number of at least 0, not {text!r}")
    return value


def _betas(text: str) -> str:
    parts = text.split(",")
    if len(parts) != 2:
        raise ValueError(f"needs two numbers separated by a comma, such as 0.9,0.999, not {text!r}")
    return ",".join(str(_probability(part)) for part in parts)


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError(f"needs the path of a file or folder, not {text!r}")
    return text


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


def _masters(text: str) -> bool | str:
    if text not in ("yes", "no", SPLIT):
        raise ValueError(f"needs yes, no or {SPLIT}, not {text!r}")
    return text if text == SPLIT else text == "yes"


def _option(default: Any, parse: Callable[[str], Any], help_text: str) -> Any:
    return field(default=default, metadata={"parse": parse, "help": help_text})


@dataclass(frozen=True)
class Config:
    """Settings of one run. Each is a command-line flag; ``None`` means "none" or "never"."""

    method: str = _option("nesterov", str, "training method, a name from `python -m nesterov_pp methods`")
    stages: int = _option(8, whole(1), "number of pipeline stages")
    microbatches: int = _option(2000, whole(1), "length of the run, in microbatches")
    seed: int = _option(0, whole(0, LARGEST_SEED), "seed for initialization, data order and dropout")
    data: str | None = _option(
        None, _path, "text file, or folder of text files, to train on (default: the Python standard library's source)"
    )
    tokenizer: str = _option(
        "bytes", _choice("bytes", "bpe"), "bytes: one token per byte; bpe: a byte-level BPE trained on the data"
    )
    vocab_size: int = _option(
        1024, whole(257, 10_000_000), "vocabulary size, in tokens; training uses it with --tokenizer bpe only"
    )
    layers: int = _option(8, whole(1, 10_000), "number of transformer blocks, divided among the stages")
    width: int = _option(64, whole(1), "width of the residual stream, the model dimension")
    heads: int = _option(4, whole(1), "number of attention heads in each block")
    context: int = _option(64, whole(1), "sequence length, in tokens")
    batch: int = _option(8, whole(1), "number of sequences in a microbatch")
    dropout: float = _option(0.0, _probability, "dropout probability")
    lr: float = _option(1e-3, _positive(), "peak learning rate")
    embedding_lr: float = _option(1.0, _positive(), "factor of --lr for the token and position embeddings")
    weight_decay: float | None = _option(
        None, _rate, "weight decay rate, which a step multiplies by the learning rate (default: the method's)"
    )
    betas: str | None = _option(None, _betas, "decay rates of the two moments, as in 0.9,0.999 (default: the method's)")
    no_decay: bool = _option(False, _yes_or_no, "no weight decay for norms, biases and embeddings (default: no)")
    weights_dtype: str = _option(
        "float32",
        _choice("float32", "bfloat16"),
        "dtype of the weights in all their versions, of their gradients and of the activations: float32 or bfloat16",
    )
    master_weights: bool | str = _option(
        False,
        _masters,
        "step a float32 copy of bfloat16 weights, which keeps small updates; 24bit: keep only the 8 bits that rounding "
        "loses (default: no)",
    )
    state_dtype: str | None = _option(
        None,
        _choice("float32", "bfloat16", EIGHT_BIT),
        "dtype of the moments: float32, bfloat16, or 8bit for codes of eight bits (default: that of the weights; "
        "float32 with --master-weights)",
    )
    stochastic_rounding: bool = _option(
        False, _yes_or_no, "round bfloat16 weights without masters, and bfloat16 moments, at random (default: no)"
    )
    stash: str = _option(
        "full",
        _choice(*FORMS),
        "how stages keep weights older than the newest: full, 8bit-differences (1.06 bytes a parameter and version) or "
        "bfloat16",
    )
    warmup: int = _option(
        100, whole(0), "length of the linear warm-up, in microbatches; a cosine decay to a tenth of --lr follows"
    )
    delays: str | None = _option(
        None,
        str,
        "delays of the stages, in updates: 3,2,1,0 (one per stage), uniform:0-4, geometric:2.5, trace:FILE or own, "
        "optionally followed by +stragglers:0.1:5 or +dropouts:0.05 (default: own, the method's delays)",
    )
    slack: int = _option(
        0,
        whole(0, 10_000),
        "further microbatches in flight, which hide the latency of slow links and make gradients later",
    )
    flush_every: int | None = _option(None, whole(1), "drain the pipeline after every X updates (default: never)")
    max_grad_norm: float | None = _option(
        None, _positive(), "clip the gradient norm of each stage to X (default: no clipping)"
    )
    eval_every: int = _option(100, whole(1), "interval between validations, in microbatches")
    eval_batches: int = _option(
        16, whole(1), "number of batches in a validation, evenly spaced over the validation text"
    )
    checkpoint_every: int = _option(500, whole(1), "interval between checkpoints, in updates")
    diagnostics: int | None = _option(
        None,
        whole(1),
        "every X updates, measure how well each late stage's look-ahead points where its weights will go "
        "(default: never)",
    )
    sample_length: int = _option(300, whole(0), "length of the text generated at the end, in tokens")
    temperature: float = _option(0.8, _positive(), "sampling temperature for the generated text")
    threads: int = _option(1, whole(1, 1024), "CPU threads per process; more than one pays off in wide models only")
    replicas: int = _option(
        1, whole(1), "number of processes that share the work of each stage, each with its own microbatches"
    )
    timeout: float = _option(
        60.0, _positive(1e8), "time that processes wait for each other before they give up, in seconds"
    )
    recompute: bool = _option(
        False, _yes_or_no, "save memory by running a stage's forward again before its backward (default: no)"
    )
    autocast: str | None = _option(
        None, _choice("bfloat16"), "dtype to compute in, with float32 weights: bfloat16 (default: no autocast)"
    )
    wire: str | None = _option(
        None,
        _choice("bfloat16", "int8"),
        "format of what stages send each other: bfloat16, or int8 in groups with a scale (default: as computed)",
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
    def own_recipe(self) -> Recipe:
        """The recipe with the hyper-parameters of this run (UserError if the method does not have one of them)."""
        try:
            return self.recipe.override(self.overrides())
        except ValueError as error:
            raise UserError(str(error)) from None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return cast(torch.dtype, getattr(torch, self.weights_dtype))

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
        self.check_optimizer()
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

    def check_optimizer(self) -> None:
        """Raise UserError if the method's rule does not take the settings of the optimizer, or they do nothing."""
        low = self.weights_dtype != "float32"
        if self.master_weights and not low:
            raise UserError("--master-weights are float32 copies of bfloat16 weights; add --weights-dtype bfloat16")
        if self.autocast is not None and low:
            raise UserError("--autocast is for float32 weights; omit it, or omit --weights-dtype")
        moments = self.state_dtype or ("bfloat16" if low and not self.master_weights else "float32")
        if self.stochastic_rounding and moments != "bfloat16" and (self.master_weights or not low):
            raise UserError(
                "--stochastic-rounding has nothing to round: it is for --weights-dtype bfloat16 without "
                "--master-weights, and for --state-dtype bfloat16"
            )
        named = {part.partition("=")[0] for part in self.method.split(":")[1:]}
        of_betas = {"betas": {"betas", "beta1", "beta2"}}
        try:
            for name, given in {**self._rule_options(), "slack": self.slack or None}.items():
                if given is not None and named & of_betas.get(name, {name}):
                    raise ValueError(f"{flag(name)} is given twice: it is also in --method {self.method}")
            recipe = self.own_recipe
            recipe.check_old_versions(cast(OldVersions, self.stash))
            if self.no_decay or self.embedding_lr != 1.0:
                recipe.check_groups()
            # A rule refuses by itself what it cannot do.
            layer, place = nn.Linear(2, 2, dtype=self.dtype), Placement(1, 1, 0)
            build_optimizer(
                recipe, layer, build_stash(recipe, layer, 1), place, lr=self.lr, max_grad_norm=None, backend="auto"
            )
        except ValueError as error:
            raise UserError(str(error)) from None

    def learning_rate(self, microbatch: int) -> float:
        """Return the learning rate of a microbatch (from 0): linear warm-up, then a cosine to a tenth.

        It is the same for every method.
        """
        if microbatch < self.warmup:
            return self.lr * (microbatch + 1) / self.warmup
        done = (microbatch - self.warmup) / max(1, self.microbatches - self.warmup)
        return self.lr * (FINAL_LR + (1.0 - FINAL_LR) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0))))

    def overrides(self) -> dict[str, Any]:
        """Return the hyper-parameters of the recipe that are given, or depend on the length of the run."""
        given = {name: value for name, value in self._rule_options().items() if value is not None}
        if self.slack:
            given["slack"] = self.slack
        if self.recipe.correction_updates is None:
            return given
        return {**given, "correction_updates": max(1, round(CORRECTION_SHARE * self.updates))}

    def _rule_options(self) -> dict[str, Any]:
        return {
            "weight_decay": self.weight_decay,
            "betas": None if self.betas is None else tuple(map(float, self.betas.split(","))),
            "state_dtype": None if self.state_dtype is None else getattr(torch, self.state_dtype, self.state_dtype),
            "master_weights": self.master_weights or None,
            "stochastic_rounding": self.stochastic_rounding or None,
        }

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
        UserError: a given setting differs from that of the run to resume.
    """
    if recorded is None:
        return Config(**given)
    for name, value in given.items():
        if name not in FREE and recorded[name] != value:
            raise UserError(differs(flag(name), recorded[name], value))
    return Config(**{**recorded, **given})


def completed(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a run recorded, with the defaults of those that came ``LATER``."""
    return {**{f.name: f.default for f in fields(Config) if f.name in LATER}, **recorded}


def recorded_settings(record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the settings in a run's record, the contents of the file ``path``.

    Raises:
        UserError: a setting is missing or unknown (the run is of another version), or its value is not possible.
    """
    settings = record.get("config")
    if not isinstance(settings, dict):
        raise UserError(f"{path} is damaged; give another --out")
    known = {f.name: f for f in fields(Config)}
    settings = completed(settings)
    if other := sorted(settings.keys() ^ known.keys()):
        raise UserError(
            f"{path} was written by another version of nesterov_pp ({record.get('nesterov_pp', 'unknown')}): only one "
            f"of it and this version ({nesterov_pp.__version__}) has {', '.join(map(flag, other))}; use that version "
            "for this run, or give another --out"
        )
    for name, value in settings.items():
        if value is None and known[name].default is None:
            continue
        try:
            fits = known[name].metadata["parse"](_as_text(value)) == value
        except ValueError:
            fits = False
        if not fits:
            raise UserError(f"{path} has {value!r} for {flag(name)}, which is not possible; give another --out")
    return settings


def differs(what: str, there: object, here: object) -> str:
    """Return the error message for a run that cannot be resumed because a setting differs."""
    was = "unset" if there is None else there
    return f"this run has {what} {was}, not {here}; omit the flag to resume the run, or give another --out"


def derived_seed(*parts: object) -> int:
    """Return a seed that depends on ``parts`` alone and is unrelated to the seed of any other parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
