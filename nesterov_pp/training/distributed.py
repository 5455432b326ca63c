"""The driver of one process of a run that ``torchrun`` has started: one stage of the pipeline."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from nesterov_pp.pipeline import AsyncPipeline, PipelineError, World, connect
from nesterov_pp.pipeline.distributed.store import Answer, SharedStore
from nesterov_pp.training import checkpoint
from nesterov_pp.training.config import Config, RunError, UserError
from nesterov_pp.training.driver import (
    Batch,
    State,
    fits,
    mean,
    pipeline_options,
    refusals_explained,
    stage_modules,
)
from nesterov_pp.training.model import next_token_loss
from nesterov_pp.training.signals import StopRequest
from nesterov_pp.training.slack import automatic_slack

T = TypeVar("T")

_ASK_EVERY = 1.0  # seconds between checks whether another process was told to stop


@contextmanager
def stage_driver(timeout: float, replicas: int) -> Iterator[StageDriver]:
    """Connect to the other processes, and disconnect from them at the end of the block.

    Raises:
        RunError: the other processes cannot be reached, or one of them is lost or stops.
    """
    try:
        with connect(timeout) as world:
            yield StageDriver(world, replicas)
    except PipelineError as error:
        raise RunError(str(error)) from None


class StageDriver:
    """The driver of this process's stage; the last stage of the first replica reports, because it has the losses."""

    def __init__(self, world: World, replicas: int) -> None:
        self.world, self.replicas, self.processes = world, replicas, world.size
        self.delays: list[int] = []
        if replicas < 1 or world.size % replicas:
            raise RunError(
                f"{world.size} processes cannot be divided into {replicas} replicas of a pipeline; "
                f"start a multiple of {replicas}, or give another --replicas"
            )
        self.stages = world.size // replicas
        self.reports = world.rank == self.stages - 1

    def agree(self, act: Callable[[], T]) -> T:
        result, trouble = None, None
        try:
            result = act()
        except UserError as error:
            trouble = error
        found = self.gather(None if trouble is None else (str(trouble), trouble.status))
        for rank, one in enumerate(found):
            if one is not None:
                again = UserError(one[0] if rank == self.world.rank else "")
                again.status = one[1]
                raise again
        return result  # type: ignore[return-value]

    def settled(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        if given.get("stages", self.stages) != self.stages:
            raise UserError(
                f"--stages {given['stages']} needs {given['stages'] * self.replicas} processes, but torchrun has "
                f"started {self.processes}; omit --stages, or start that many"
            )
        return {**given, "stages": self.stages}

    def resumes(self, resume: bool) -> bool:
        """Return whether to resume: if asked to, or after a restart by ``torchrun --max-restarts``.

        Machines count their restarts separately, so one that has counted a restart decides for all.
        """
        return any(self.gather(resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))

    def slack(self, config: Config, asked: bool) -> tuple[int, str]:
        return automatic_slack(self.world, self.replicas, config, asked=asked)

    def build(self, config: Config, vocabulary: int, batch: Batch) -> None:
        if config.diagnostics is not None:
            raise UserError("--diagnostics needs all stages in one process; start the run without torchrun")
        if config.delays is not None:
            raise UserError(
                "--delays needs a virtual pipeline, in one process; start the run without torchrun, or omit --delays"
            )
        if config.device != "cpu":
            raise UserError(
                f"--device {config.device} trains in one process; start the run without torchrun, or omit --device"
            )
        self._every = config.checkpoint_every
        self.pipe = refusals_explained(
            lambda: AsyncPipeline(
                stage_modules(config, vocabulary),
                next_token_loss,
                batch,
                config.microbatches,
                self.world,
                replicas=self.replicas,
                **pipeline_options(config),
            )
        )
        self.delays = self.pipe.delays
        self._stop = AgreedStop(self.world, margin=self.pipe.in_flight + 3)
        self._keep()

    def newest(self, folder: Path) -> State | None:
        path = checkpoint.newest(folder, self._part(), self.gather)
        return None if path is None else checkpoint.load(path)

    def load(self, state: State) -> None:
        fits(lambda: self.pipe.load_state_dict(state["pipeline"]))
        self._keep()

    def save(self, folder: Path, done: int, state: State) -> None:
        if self.pipe.replica == 0:
            whole = {**state, "pipeline": self.pipe.state_dict()}
            # No stage is further behind this one.
            certain = done - self.pipe.in_flight
            checkpoint.save(folder, done, whole, part=self._part(), certain=certain)
        self._keep()

    def step(self, lr: float) -> float | None:
        self.pipe.lr = lr
        loss = self.pipe.step()
        return None if loss is None or not self.reports else float(loss)

    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float | None:
        if self.pipe.replica:
            return None
        losses = [self.pipe.evaluate(*batch) for batch in batches]
        return mean([float(loss) for loss in losses if loss is not None]) if self.reports else None

    def observe(self) -> list[tuple[int, float]]:
        return []

    def predict(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.pipe.predict(tokens)
        return logits

    def stopping(self, stop: StopRequest, updates: int) -> bool:
        before = self._stop.at
        now = self._stop.reached(stop.received is not None, updates)
        if self._stop.at != before and self._stop.at is not None:
            self.pipe.keep_for(self._stop.at)
        return now

    def waiting(self) -> bool:
        return self.pipe.microbatches % self.pipe.microbatches_per_update > 0

    def updates(self) -> int:
        return self.pipe.updates

    def memory(self) -> dict[str, int]:
        return self.pipe.memory()

    def optimizer_seconds(self) -> float:
        return self.pipe.optimizer_seconds

    def gather(self, value: T) -> list[T]:
        return self.world.gather(value)

    def command(self, out: Path) -> str:
        return f"torchrun --nproc-per-node {self.processes} -m nesterov_pp train --resume --out {out}"

    def _part(self) -> str:
        return checkpoint.stage_part(self.pipe.stage, self.stages)

    def _keep(self) -> None:
        self.pipe.keep_for((self.pipe.updates // self._every + 1) * self._every)


class AgreedStop:
    """The number of updates at which every process stops, although each is at a different one when told to stop.

    Each process that was told to stop, or finds that another was, writes its number of updates to the store and
    continues. When all have written, the highest number plus ``margin`` is one that no process has passed: stages
    depend on each other's microbatches, so none gets further ahead than that.
    """

    def __init__(self, world: World, margin: int) -> None:
        self._world, self._margin = world, margin
        self._written = False
        self._asked = time.monotonic()
        self._answer: Answer[list[str] | None] | None = None
        self.at: int | None = None

    def reached(self, told: bool, updates: int) -> bool:
        """Return whether this process, after ``updates`` updates, must stop now."""
        store = self._world.store
        if store is None:
            return told
        if not self._written and (told or self._others_were_told(store)):
            store.set(f"stop/{self._world.rank}", str(updates))
            store.set("stop", "")
            self._written = True
        if self._written and self.at is None:
            found = store.words(*(f"stop/{rank}" for rank in range(self._world.size)))
            if found is not None:
                self.at = max(map(int, found)) + self._margin
        return self.at is not None and updates >= self.at

    def _others_were_told(self, store: SharedStore) -> bool:
        """Return whether another process was told to stop, asked once a second and without waiting for the answer."""
        if self._answer is not None:
            if not self._answer.ready:
                return False
            answer, self._answer = self._answer, None
            with suppress(RuntimeError):  # a lost store is noticed by whoever needs it
                return answer.get(0.0) is not None
        now = time.monotonic()
        if now - self._asked >= _ASK_EVERY:
            self._asked, self._answer = now, store.ask("stop")
        return False
