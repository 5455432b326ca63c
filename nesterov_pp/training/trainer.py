"""One run, from the text to the report. The trainer owns the run's files and does not know the schedule."""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import nesterov_pp
from nesterov_pp.pipeline.distributed.world import launched
from nesterov_pp.terminal import make_console, say
from nesterov_pp.training import checkpoint, plots, report
from nesterov_pp.training.config import (
    FREE,
    Config,
    RunError,
    UserError,
    completed,
    derived_seed,
    flag,
    recorded_settings,
    settle,
)
from nesterov_pp.training.data import Corpus, Text, read_text, tokenize
from nesterov_pp.training.distributed import stage_driver
from nesterov_pp.training.driver import Driver, VirtualDriver, enough_memory
from nesterov_pp.training.folder import RunFolder
from nesterov_pp.training.metrics import read_curves
from nesterov_pp.training.outputs import Outputs, Silence
from nesterov_pp.training.sample import generate, printable
from nesterov_pp.training.signals import InterruptionError, StopRequest
from nesterov_pp.training.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer

AUTO = "auto"
"""The slack that is chosen for the links of the run; also what a new run has without --slack."""

PROMPT = 32
"""The number of tokens of validation text that the sample continues."""


@dataclass
class Totals:
    """Totals of a run in this process, across interruptions. Seconds are those of training steps alone."""

    seconds: float = 0.0
    optimizer_seconds: float = 0.0
    peak_memory: int = 0


def train(given: Mapping[str, Any], out: Path, *, resume: bool = False, console: Console | None = None) -> None:
    """Start or resume a run in the folder ``out``; a run that is finished is reported again.

    Args:
        given: settings by their names in ``Config``; the rest are those of the run to resume, or the defaults.
        out: an absent or empty folder, or with ``resume`` the folder of an unfinished run, which continues after its
            newest checkpoint with the losses it would have had without the interruption.

    Raises:
        UserError: a setting, the data or the folder is unusable; nothing has been changed.
        RunError: the loss is not finite, or a file cannot be written; the checkpoints are kept.
        InterruptionError: SIGINT or SIGTERM arrived; a checkpoint has been written.
    """
    if not launched():
        _train(VirtualDriver(), given, out, resume, console or make_console())
        return
    with stage_driver(given.get("timeout", Config.timeout), given.get("replicas", Config.replicas)) as driver:
        quiet = Console(quiet=True)
        _train(driver, given, out, resume, console or (make_console() if driver.reports else quiet))


def _train(driver: Driver, given: Mapping[str, Any], out: Path, resume: bool, console: Console) -> None:
    folder = RunFolder(out)
    if given.get("data") is not None:
        given = {**given, "data": str(Path(given["data"]).resolve())}
    with StopRequest(patient=driver.processes > 1) as stop:
        resume = driver.resumes(resume)
        config, recorded = driver.agree(lambda: _settled(driver, given, folder, resume))
        if recorded is not None and folder.summary.exists():
            say(console, f"The run in {out} is finished.")
            report.print_summary(console, report.read_summary(folder.summary))
            return
        if recorded is not None and recorded.get("nesterov_pp") != nesterov_pp.__version__:
            begun = recorded.get("nesterov_pp", "an unknown version")
            say(
                console,
                f"Warning: this run was begun with nesterov_pp {begun} and continues with {nesterov_pp.__version__}; "
                "its losses may differ from those of an uninterrupted run.",
            )
        torch.set_num_threads(config.threads)
        if recorded is None and given.get("slack", AUTO) == AUTO:
            slack, why = driver.slack(config, asked="slack" in given)
            config = replace(config, slack=slack)
            driver.agree(config.check)
            if why:
                say(console, why)
        text, tokenizer, corpus = driver.agree(lambda: _data(config, recorded, folder))
        record = {
            "nesterov_pp": nesterov_pp.__version__,
            "config": asdict(config),
            "processes": driver.processes,
            "data_digest": text.digest,
            "tokenizer_digest": tokenizer.digest,
        }
        run = driver.agree(lambda: _Run(driver, config, corpus, tokenizer, folder, record, console))
        with ExitStack() as claim:
            driver.agree(lambda: claim.enter_context(folder.claimed()) if driver.reports else None)
            state = driver.agree(lambda: _newest_checkpoint(driver, folder, record)) if recorded is not None else None
            if recorded is None and driver.reports:
                checkpoint.write_text(folder.config, json.dumps(record, indent=2) + "\n")
            if isinstance(tokenizer, BpeTokenizer) and not folder.tokenizer.exists() and driver.reports:
                checkpoint.write_text(folder.tokenizer, tokenizer.definition)
            run.announce(text)
            run.go_on(state, stop)
            run.finish()


def _settled(
    driver: Driver, given: Mapping[str, Any], folder: RunFolder, resume: bool
) -> tuple[Config, dict[str, Any] | None]:
    """Return the configuration, and the record of the run to resume (None for a new run)."""
    given = {name: value for name, value in driver.settled(given).items() if (name, value) != ("slack", AUTO)}
    recorded = folder.recorded(resume=resume)
    if recorded is not None and recorded.get("processes", 1) != driver.processes:
        there = recorded.get("processes", 1)
        how = f"torchrun --nproc-per-node {there} -m" if there != 1 else "python -m"
        raise UserError(
            f"the run in {folder.path} has {there} process(es), not {driver.processes}; "
            f"resume with: {how} nesterov_pp train --resume --out {folder.path}"
        )
    config = settle(given, None if recorded is None else recorded_settings(recorded, folder.config))
    config.check()
    return config, recorded


def _data(config: Config, recorded: dict[str, Any] | None, folder: RunFolder) -> tuple[Text, Tokenizer, Corpus]:
    text = read_text(config.data, whole_characters=config.tokenizer == "bpe")
    if recorded is not None and recorded.get("data_digest") != text.digest:
        raise UserError(f"the text of {text.name} has changed since this run began; give another --out")
    tokenizer = _tokenizer(config, text, folder)
    return text, tokenizer, tokenize(text, tokenizer, config.context)


def _tokenizer(config: Config, text: Text, folder: RunFolder) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if folder.tokenizer.exists() or checkpoint.checkpoints(folder.path):
        return BpeTokenizer.load(folder.tokenizer)
    return BpeTokenizer.train(text.train, config.vocab_size)


def _newest_checkpoint(driver: Driver, folder: RunFolder, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the newest checkpoint; raise UserError if it is damaged or belongs to another run."""
    state = driver.newest(folder.path)
    if state is None:
        return None
    theirs = state["record"]
    settings = completed(theirs["config"])
    unlike = [
        f"{flag(name)} {settings.get(name)}, not {value}"
        for name, value in record["config"].items()
        if name not in FREE and settings.get(name) != value
    ]
    unlike += [f"different {n.split('_')[0]}" for n in ("data_digest", "tokenizer_digest") if theirs[n] != record[n]]
    if unlike:
        name = f"the checkpoint in {folder.path} after microbatch {state['microbatch']}"
        raise UserError(f"{name} belongs to another configuration ({unlike[0]}); remove it, or give another --out")
    return state


class _Run:
    def __init__(
        self,
        driver: Driver,
        config: Config,
        corpus: Corpus,
        tokenizer: Tokenizer,
        folder: RunFolder,
        record: dict[str, Any],
        console: Console,
    ) -> None:
        self.driver, self.config, self.corpus, self.tokenizer = driver, config, corpus, tokenizer
        self.folder, self.record, self.console = folder, record, console
        self.sums = Totals()
        driver.build(config, tokenizer.size, lambda m: corpus.batch(config.seed, m, config.batch, config.context))
        with enough_memory(UserError, "the batches of a validation; use fewer --eval-batches or a smaller --batch"):
            self.validation = corpus.validation_batches(config.eval_batches, config.batch, config.context)

    def announce(self, text: Text) -> None:
        """Print what is about to run, and the memory it takes."""
        left_out = f", {text.skipped} empty or binary files left out" if text.skipped else ""
        say(
            self.console,
            f"{self.config.method}, {self.config.stages} stages. Data: {text.name}, "
            f"{len(self.corpus.train):,} + {len(self.corpus.validation):,} tokens for training and validation, "
            f"vocabulary {self.tokenizer.size}{left_out}.",
        )
        say(self.console, report.memory_line(self._memory(), self.driver.delays))

    def go_on(self, state: dict[str, Any] | None, stop: StopRequest) -> None:
        """Train from a checkpoint (None: from the start) to the end, or until a signal."""
        config, driver = self.config, self.driver
        start, keep = 0, 0
        if state is not None:
            driver.agree(lambda: driver.load(state))
            self.sums = Totals(**state["totals"])
            start, keep = int(state["microbatch"]), int(state["metrics_bytes"])
        self._optimizer_seconds_before = self.sums.optimizer_seconds
        tokens = config.batch * config.context * config.replicas
        self.outputs: Outputs | Silence = Silence()
        if driver.reports:
            self.outputs = Outputs(config, self.folder, self.console, keep, start)
        seconds_before = self.sums.seconds
        with self.outputs:
            for m in range(start, config.microbatches):
                done = m + 1
                loss = self._step(m)
                if loss is not None:
                    rate = (done - start) * tokens / (self.sums.seconds - seconds_before)
                    self.outputs.trained(done, loss, config.learning_rate(m), rate)
                last = done == config.microbatches
                if last or done % config.eval_every == 0:
                    validation_loss = self._validate(done)
                    if validation_loss is not None:
                        self.outputs.validated(done, validation_loss)
                if driver.waiting():
                    continue
                for stage, cosine in driver.observe():
                    self.outputs.measured(done, stage, cosine)
                stopping = driver.stopping(stop, driver.updates())
                if last or stopping or driver.updates() % config.checkpoint_every == 0:
                    self._save(done)
                if stopping and not last:
                    number = stop.received or signal.SIGTERM
                    raise InterruptionError(number, self._how_to_go_on(done, number) if driver.reports else "")

    def finish(self) -> None:
        """Write the plots, the sample and the summary (which marks the run as finished); print the table."""
        config, driver = self.config, self.driver
        prompt = self.corpus.validation[: min(PROMPT, config.context)].long()
        tokens = generate(
            driver.predict,
            prompt,
            config.sample_length,
            context=config.context,
            temperature=config.temperature,
            seed=derived_seed("sample", config.seed),
        )
        self._sum_up()
        memory, everyone = self._memory(), driver.gather(self.sums)
        if not driver.reports:
            return
        curves = read_curves(self.folder.metrics)
        checkpoint.write_atomic(self.folder.plot, lambda file: plots.draw_run(file, curves, config.method))
        if curves.cosines:
            draw = partial(plots.draw_alignment, cosines=curves.cosines, delays=driver.delays)
            checkpoint.write_atomic(self.folder.alignment_plot, draw)
        sample = printable(self.tokenizer.decode(prompt.tolist() + tokens))
        checkpoint.write_text(self.folder.sample, sample + "\n")
        summary = report.summarise(
            config,
            curves,
            delays=driver.delays,
            memory=memory,
            seconds=self.sums.seconds,
            optimizer_seconds=max(sums.optimizer_seconds for sums in everyone),
            peak_memory=sum(sums.peak_memory for sums in everyone),
        )
        checkpoint.write_text(self.folder.summary, json.dumps(summary, indent=2) + "\n")
        if config.sample_length:
            report.print_sample(self.console, sample)
        report.print_summary(self.console, summary)
        say(self.console, f"The loss curves, the sample and the metrics are in {self.folder.path}.")

    def _step(self, m: int) -> float | None:
        begin = time.perf_counter()
        with enough_memory(RunError, "a microbatch; use a smaller --batch, --context or --width"):
            loss = self.driver.step(self.config.learning_rate(m))
        self.sums.seconds += time.perf_counter() - begin
        if loss is not None and not math.isfinite(loss):
            self._diverged(loss, m + 1)
        return loss

    def _validate(self, done: int) -> float | None:
        loss = self.driver.validate(self.validation)
        if loss is not None and not math.isfinite(loss):
            self._diverged(loss, done)
        return loss

    def _sum_up(self) -> None:
        self.sums.optimizer_seconds = self._optimizer_seconds_before + self.driver.optimizer_seconds()
        self.sums.peak_memory = max(self.sums.peak_memory, _peak_memory())

    def _memory(self) -> dict[str, int]:
        parts = self.driver.gather(self.driver.memory())
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def _save(self, done: int) -> None:
        self._sum_up()
        # Every line up to here is on disk before the checkpoint that relies on it.
        state = {"metrics_bytes": self.outputs.sync(), "record": self.record, "totals": asdict(self.sums)}
        self.driver.save(self.folder.path, done, state)

    def _diverged(self, loss: float, microbatch: int) -> None:
        saved = checkpoint.checkpoints(self.folder.path)
        kept = f"{saved[-1]} is kept" if saved else "no checkpoint has been written yet"
        advice = "try a smaller --lr, or --max-grad-norm 1"
        raise RunError(f"the loss is {loss} at microbatch {microbatch}; {kept}; {advice}")

    def _how_to_go_on(self, done: int, number: int) -> str:
        name = "Ctrl-C" if number == 2 else "SIGTERM"
        command = self.driver.command(self.folder.path)
        return f"stopped by {name} after microbatch {done} of {self.config.microbatches}; resume with: {command}"


def _peak_memory() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
