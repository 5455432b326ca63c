"""One run, from the text to the report. It owns the run's files, and knows no schedule."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import nesterov_pp
from nesterov_pp.pipeline import VirtualPipeline
from nesterov_pp.training import checkpoint, plots, report
from nesterov_pp.training.config import FREE, Config, RunError, UserError, derived_seed, flag, settle
from nesterov_pp.training.data import Corpus, Text, read_text, tokenize
from nesterov_pp.training.diagnostics import Diagnostics
from nesterov_pp.training.folder import RunFolder, read_object
from nesterov_pp.training.metrics import MetricsLog, read_curves, tensorboard_writer
from nesterov_pp.training.model import build_stages, next_token_loss
from nesterov_pp.training.sample import generate, printable
from nesterov_pp.training.signals import InterruptionError, StopRequest
from nesterov_pp.training.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer

PROMPT = 32
"""Tokens of validation text that the sample continues."""

_SCALARS_EVERY = 10


@dataclass
class Totals:
    """Sums over a run, interruptions included. Seconds are those of training steps alone."""

    seconds: float = 0.0
    optimizer_seconds: float = 0.0
    peak_memory: int = 0


def train(given: Mapping[str, Any], out: Path, *, resume: bool = False, console: Console | None = None) -> None:
    """Run or go on with a run in the folder ``out``; a run that is finished is reported again.

    Args:
        given: settings by the names of ``Config``; the rest are those of the run to go on with, or the defaults.
        out: absent or empty, or with ``resume`` the folder of an unfinished run, which goes on after its newest
            checkpoint with the losses it would have had without the interruption.

    Raises:
        UserError: a setting, the data or the folder is not usable; nothing has been changed.
        RunError: the loss is not finite, or a file cannot be written; the checkpoints are kept.
        InterruptionError: SIGINT or SIGTERM arrived; a checkpoint has been written.
    """
    console = console or report.make_console()
    folder = RunFolder(out)
    if given.get("data") is not None:
        given = {**given, "data": str(Path(given["data"]).resolve())}
    with StopRequest() as stop:
        recorded = folder.recorded(resume=resume)
        config = settle(given, None if recorded is None else _part(recorded, "config", folder.config))
        config.check()
        if recorded is not None and folder.summary.exists():
            console.print(f"The run in {out} is finished.")
            report.print_summary(console, read_object(folder.summary))
            return
        torch.set_num_threads(config.threads)
        text = read_text(config.data)
        if recorded is not None and recorded.get("data_digest") != text.digest:
            raise UserError(f"the text of {text.name} has changed since this run began; give another --out")
        tokenizer = _tokenizer(config, text, folder)
        corpus = tokenize(text, tokenizer, config.context)
        record = {
            "nesterov_pp": nesterov_pp.__version__,
            "config": asdict(config),
            "data_digest": text.digest,
            "tokenizer_digest": tokenizer.digest,
        }
        run = _Run(config, corpus, tokenizer, folder, record, console)
        with folder.claimed():
            state = _newest_checkpoint(folder, record) if recorded is not None else None
            if recorded is None:
                checkpoint.write_text(folder.config, json.dumps(record, indent=2) + "\n")
            if isinstance(tokenizer, BpeTokenizer) and not folder.tokenizer.exists():
                checkpoint.write_text(folder.tokenizer, tokenizer.definition)
            run.announce(text)
            run.go_on(state, stop)
            run.finish()


def _part(record: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    part = record.get(name)
    if not isinstance(part, dict):
        raise UserError(f"{path} is damaged; give another --out")
    return part


def _tokenizer(config: Config, text: Text, folder: RunFolder) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if folder.tokenizer.exists() or checkpoint.checkpoints(folder.path):
        return BpeTokenizer.load(folder.tokenizer)
    return BpeTokenizer.train(text.train, config.vocab_size)


def _newest_checkpoint(folder: RunFolder, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Raises: UserError: it is damaged, or of another run."""
    saved = checkpoint.checkpoints(folder.path)
    if not saved:
        return None
    state = checkpoint.load(saved[-1])
    theirs = state["record"]
    unlike = [
        f"{flag(name)} {theirs['config'].get(name)}, not {value}"
        for name, value in record["config"].items()
        if name not in FREE and theirs["config"].get(name) != value
    ]
    unlike += [f"another {n.split('_')[0]}" for n in ("data_digest", "tokenizer_digest") if theirs[n] != record[n]]
    if unlike:
        raise UserError(f"{saved[-1]} is of another configuration ({unlike[0]}); remove it, or give another --out")
    return state


class _Run:
    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        tokenizer: Tokenizer,
        folder: RunFolder,
        record: dict[str, Any],
        console: Console,
    ) -> None:
        self.config, self.corpus, self.tokenizer = config, corpus, tokenizer
        self.folder, self.record, self.console = folder, record, console
        self.totals = Totals()
        self.pipe = _pipeline(config, tokenizer.size)
        self.diagnostics = None if config.diagnostics is None else Diagnostics(self.pipe, config.diagnostics)
        self.validation = corpus.validation_batches(config.eval_batches, config.batch, config.context)

    def announce(self, text: Text) -> None:
        """What is about to happen, and the memory it takes."""
        left_out = f", {text.skipped} empty or binary files left out" if text.skipped else ""
        self.console.print(
            f"{self.config.method}, {self.config.stages} stages. Data: {text.name}, "
            f"{len(self.corpus.train):,} + {len(self.corpus.validation):,} tokens to train and validate on, "
            f"vocabulary {self.tokenizer.size}{left_out}.",
            soft_wrap=True,
        )
        self.console.print(report.memory_line(self.pipe.memory(), self.pipe.delays), soft_wrap=True)

    def go_on(self, state: dict[str, Any] | None, stop: StopRequest) -> None:
        """Train from a checkpoint (None: from the start) to the end, or until a signal."""
        config, pipe = self.config, self.pipe
        start = 0
        if state is not None:
            try:
                pipe.load_state_dict(state["pipeline"])
                if self.diagnostics is not None:
                    self.diagnostics.load_state_dict(state.get("diagnostics", {}))
            except ValueError as error:
                raise UserError(f"the checkpoint does not fit: {error}") from None
            self.totals = Totals(**state["totals"])
            start = int(state["microbatch"])
        self._optimizer_seconds_before = self.totals.optimizer_seconds
        self.log = MetricsLog(self.folder.metrics, keep=0 if state is None else int(state["metrics_bytes"]))
        scalars = tensorboard_writer(self.folder.tensorboard, start)
        session_start = self.totals.seconds
        progress = report.RunProgress(self.console, start, config.microbatches)
        try:
            for m in range(start, config.microbatches):
                done = m + 1
                loss = self._step(m)
                rate = (done - start) * config.batch * config.context / (self.totals.seconds - session_start)
                progress.step(done, loss, rate)
                self.log.write(microbatch=done, loss=loss, lr=pipe.lr)
                if done % _SCALARS_EVERY == 0:
                    scalars.add_scalar("loss/train", loss, done)
                    scalars.add_scalar("lr", pipe.lr, done)
                    scalars.add_scalar("tokens_per_second", rate, done)
                last = done == config.microbatches
                if last or done % config.eval_every == 0:
                    validation_loss = self._validate(done)
                    progress.validated(validation_loss)
                    self.log.write(microbatch=done, validation_loss=validation_loss)
                    scalars.add_scalar("loss/validation", validation_loss, done)
                if pipe.waiting:
                    continue
                for stage, cosine in self.diagnostics.observe() if self.diagnostics is not None else ():
                    self.log.write(microbatch=done, stage=stage, cosine=cosine)
                    scalars.add_scalar(f"cosine/stage_{stage}", cosine, done)
                stopping = stop.received is not None
                if last or stopping or pipe.updates % config.checkpoint_every == 0:
                    self._save(done)
                if stopping and not last:
                    raise InterruptionError(stop.received or 0, self._how_to_go_on(done, stop.received or 0))
        finally:
            progress.close()
            self.log.close()
            scalars.close()

    def finish(self) -> None:
        """Plot, sample, summary (which marks the run as finished), table."""
        config, pipe = self.config, self.pipe
        curves = read_curves(self.folder.metrics)
        checkpoint.write_atomic(self.folder.plot, lambda file: plots.draw_run(file, curves, config.method))
        if curves.cosines:
            draw = partial(plots.draw_alignment, cosines=curves.cosines, delays=pipe.delays)
            checkpoint.write_atomic(self.folder.alignment_plot, draw)
        prompt = self.corpus.validation[: min(PROMPT, config.context)].long()
        tokens = generate(
            pipe.predict,
            prompt,
            config.sample_length,
            context=config.context,
            temperature=config.temperature,
            seed=derived_seed("sample", config.seed),
        )
        sample = printable(self.tokenizer.decode(prompt.tolist() + tokens))
        checkpoint.write_text(self.folder.sample, sample + "\n")
        summary = report.summarise(
            config,
            curves,
            delays=pipe.delays,
            memory=pipe.memory(),
            seconds=self.totals.seconds,
            optimizer_seconds=self.totals.optimizer_seconds,
            peak_memory=max(self.totals.peak_memory, _peak_memory()),
        )
        checkpoint.write_text(self.folder.summary, json.dumps(summary, indent=2) + "\n")
        if config.sample_length:
            report.print_sample(self.console, sample)
        report.print_summary(self.console, summary)
        self.console.print(f"Loss curves, sample and metrics are in {self.folder.path}.", soft_wrap=True)

    def _step(self, m: int) -> float:
        config, pipe = self.config, self.pipe
        pipe.lr = config.learning_rate(m)
        begin = time.perf_counter()
        loss = float(pipe.step(*self.corpus.batch(config.seed, m, config.batch, config.context)))
        self.totals.seconds += time.perf_counter() - begin
        self.totals.optimizer_seconds = self._optimizer_seconds_before + pipe.optimizer_seconds
        if not math.isfinite(loss):
            self._diverged(loss, m + 1)
        return loss

    def _validate(self, done: int) -> float:
        losses = [float(self.pipe.evaluate(*batch)) for batch in self.validation]
        mean = math.fsum(losses) / len(losses)
        if not math.isfinite(mean):
            self._diverged(mean, done)
        return mean

    def _save(self, done: int) -> None:
        self.totals.peak_memory = max(self.totals.peak_memory, _peak_memory())
        # Every line up to here is on the disk before the checkpoint that counts on it.
        state: dict[str, Any] = {"metrics_bytes": self.log.sync(), "record": self.record, "totals": asdict(self.totals)}
        if self.diagnostics is not None:
            state["diagnostics"] = self.diagnostics.state_dict()
        checkpoint.save(self.folder.path, done, {**state, "pipeline": self.pipe.state_dict()})

    def _diverged(self, loss: float, microbatch: int) -> None:
        saved = checkpoint.checkpoints(self.folder.path)
        kept = f"{saved[-1]} is kept" if saved else "no checkpoint was due before"
        advice = "try a smaller --lr, or --max-grad-norm 1"
        raise RunError(f"the loss is {loss} at microbatch {microbatch}; {kept}; {advice}")

    def _how_to_go_on(self, done: int, number: int) -> str:
        name = "Ctrl-C" if number == 2 else "SIGTERM"
        command = f"python -m nesterov_pp train --resume --out {self.folder.path}"
        return f"stopped by {name} after microbatch {done} of {self.config.microbatches}; go on with: {command}"


def _pipeline(config: Config, vocabulary: int) -> VirtualPipeline:
    """Raises: UserError: the pipeline refuses the settings, or there is not enough memory."""
    try:
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
        return VirtualPipeline(
            stages,
            next_token_loss,
            config.method,
            config.lr,
            flush_every=config.flush_every,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed if config.dropout else None,
            backend=config.backend,
            **config.overrides(),
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        raise UserError("there is not enough memory for this model; use a smaller --width or fewer --layers") from None


def _peak_memory() -> int:
    """Of this process so far, resident, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
