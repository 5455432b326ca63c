"""Drivers, which compute a run's microbatches: a virtual pipeline here, a process of a real one in ``distributed``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from nesterov_pp.pipeline import Delays, ParamGroups, VirtualPipeline, no_decay
from nesterov_pp.training import checkpoint
from nesterov_pp.training.config import Config, UserError
from nesterov_pp.training.delay_words import read_delays
from nesterov_pp.training.diagnostics import Diagnostics
from nesterov_pp.training.model import build_stages, next_token_loss, scaled_embeddings
from nesterov_pp.training.signals import StopRequest

T = TypeVar("T")
Batch = Callable[[int], tuple[Tensor, Tensor]]
State = dict[str, Any]


class Driver(Protocol):
    """The trainer's interface to a pipeline. In a run of several processes, all of them make the same calls.

    Attributes:
        reports: whether this process writes the run's files and prints its messages.
        processes: the number of processes.
        delays: the delay of each stage, in updates.
    """

    reports: bool
    processes: int
    delays: list[int]

    def agree(self, act: Callable[[], T]) -> T:
        """Return ``act()``; if it raises ``UserError`` on a process, all processes stop, and one of them says why."""

    def settled(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the settings, with those that follow from the number of processes."""

    def resumes(self, resume: bool) -> bool:
        """Return whether to resume the run in the folder."""

    def slack(self, config: Config, asked: bool) -> tuple[int, str]:
        """Return the slack for the links of the run, and a sentence if there is something to say about it."""

    def build(self, config: Config, vocabulary: int, batch: Batch) -> None:
        """Build the pipeline; raise UserError if it refuses the settings or there is not enough memory."""

    def newest(self, folder: Path) -> State | None:
        """Return the newest checkpoint that every process has."""

    def load(self, state: State) -> None:
        """Continue from the checkpoint that ``newest`` returned; raise UserError if it does not fit."""

    def save(self, folder: Path, done: int, state: State) -> None:
        """Write a checkpoint after ``done`` microbatches."""

    def step(self, lr: float) -> float | None:
        """Complete a microbatch; return its loss on the process that reports."""

    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float | None:
        """Return the mean loss with the newest weights, on the process that reports."""

    def observe(self) -> list[tuple[int, float]]:
        """Return, after each update, stage (from 1) and cosine of the ``--diagnostics`` measurements that ended."""

    def predict(self, tokens: Tensor) -> Tensor:
        """Return the logits with the newest weights."""

    def stopping(self, stop: StopRequest, updates: int) -> bool:
        """Return whether to stop after ``updates`` updates, the same number on all processes."""

    def waiting(self) -> bool:
        """Return whether microbatches of an unfinished update are waiting."""

    def updates(self) -> int:
        """Return the number of updates done."""

    def memory(self) -> dict[str, int]:
        """Return the bytes that this process holds, by purpose."""

    def optimizer_seconds(self) -> float:
        """Return the seconds that this process has spent in optimizer steps."""

    def gather(self, value: T) -> list[T]:
        """Return the ``value`` of every process."""

    def command(self, out: Path) -> str:
        """Return the command that resumes the run in a folder."""


class VirtualDriver:
    """The driver of a virtual pipeline, with all stages in this process."""

    reports = True
    processes = 1

    def __init__(self) -> None:
        self.delays: list[int] = []

    def agree(self, act: Callable[[], T]) -> T:
        return act()

    def settled(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        return given

    def resumes(self, resume: bool) -> bool:
        return resume

    def slack(self, config: Config, asked: bool) -> tuple[int, str]:
        return 0, ""

    def build(self, config: Config, vocabulary: int, batch: Batch) -> None:
        if config.replicas > 1:
            raise UserError("--replicas needs several processes; start them with torchrun")
        self._batch, self._device = batch, torch.device(config.device)

        def pipeline() -> VirtualPipeline:
            stages = [stage.to(self._device) for stage in stage_modules(config, vocabulary)]
            return VirtualPipeline(stages, next_token_loss, delays=_delays(config), **pipeline_options(config))

        self.pipe = refusals_explained(pipeline)
        self.delays = self.pipe.delays
        self._diagnostics = None if config.diagnostics is None else Diagnostics(self.pipe, config.diagnostics)

    def newest(self, folder: Path) -> State | None:
        path = checkpoint.newest(folder, "", self.gather)
        return None if path is None else checkpoint.load(path)

    def load(self, state: State) -> None:
        fits(lambda: self.pipe.load_state_dict(state["pipeline"]))
        if self._diagnostics is not None:
            diagnostics = self._diagnostics
            fits(lambda: diagnostics.load_state_dict(state.get("diagnostics", {})))

    def save(self, folder: Path, done: int, state: State) -> None:
        if self._diagnostics is not None:
            state = {**state, "diagnostics": self._diagnostics.state_dict()}
        checkpoint.save(folder, done, {**state, "pipeline": self.pipe.state_dict()})

    def step(self, lr: float) -> float:
        self.pipe.lr = lr
        return float(self.pipe.step(*self._on_device(self._batch(self.pipe.microbatches))))

    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        return mean([float(self.pipe.evaluate(*self._on_device(batch))) for batch in batches])

    def observe(self) -> list[tuple[int, float]]:
        return [] if self._diagnostics is None else self._diagnostics.observe()

    def predict(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.pipe.predict(tokens.to(self._device))
        return logits.cpu()

    def stopping(self, stop: StopRequest, updates: int) -> bool:
        return stop.received is not None

    def waiting(self) -> bool:
        return self.pipe.waiting > 0

    def updates(self) -> int:
        return self.pipe.updates

    def memory(self) -> dict[str, int]:
        return self.pipe.memory()

    def optimizer_seconds(self) -> float:
        return self.pipe.optimizer_seconds

    def gather(self, value: T) -> list[T]:
        return [value]

    def command(self, out: Path) -> str:
        return f"python -m nesterov_pp train --resume --out {out}"

    def _on_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        return inputs.to(self._device), targets.to(self._device)


def stage_modules(config: Config, vocabulary: int) -> list[nn.Module]:
    """Return the model of a run, cut into stages."""
    stages = build_stages(
        vocabulary=vocabulary,
        stages=config.stages,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        context=config.context,
        dropout=config.dropout,
        seed=config.seed,
    )
    return [stage.to(config.dtype) for stage in stages]


def _delays(config: Config) -> Delays | None:
    if config.delays is None:
        return None
    k = config.microbatches_per_update
    try:
        return read_delays(config.delays, config.recipe, config.stages, k, config.seed)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--delays {config.delays} names a file that is not text; give a trace of delays") from None


def pipeline_options(config: Config) -> dict[str, Any]:
    """Return the keyword arguments that every pipeline of a run takes."""
    return {
        "method": config.method,
        "lr": config.lr,
        "flush_every": config.flush_every,
        "max_grad_norm": config.max_grad_norm,
        "param_groups": _groups(config),
        "seed": config.seed,
        "backend": config.backend,
        "old_versions": config.stash,
        "recompute": config.recompute,
        "wire": config.wire,
        "autocast": None if config.autocast is None else getattr(torch, config.autocast),
        **config.overrides(),
    }


def _groups(config: Config) -> ParamGroups | None:
    scaled = None if config.embedding_lr == 1.0 else scaled_embeddings(config.embedding_lr)
    return no_decay(within=scaled) if config.no_decay else scaled


def refusals_explained(build: Callable[[], T]) -> T:
    """Return ``build()``; raise UserError if the pipeline refuses the settings or there is not enough memory."""
    try:
        with enough_memory(UserError, "this model; use a smaller --width or fewer --layers"):
            return build()
    except ValueError as error:
        raise UserError(str(error)) from None


@contextmanager
def enough_memory(kind: type[UserError], needed: str) -> Iterator[None]:
    """Raise ``kind``, which says what is ``needed``, if there is not enough memory for the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        raise kind(f"there is not enough memory for {needed}") from None


def fits(load: Callable[[], None]) -> None:
    """Call ``load``; raise UserError if the checkpoint does not fit."""
    try:
        load()
    except ValueError as error:
        raise UserError(f"the checkpoint does not fit this run: {error}") from None


def mean(losses: Sequence[float]) -> float:
    """Return the mean of the losses; NaN if one of them is not finite."""
    return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan
