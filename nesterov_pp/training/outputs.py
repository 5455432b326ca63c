"""The outputs of a run while it trains: metrics lines, TensorBoard scalars and progress."""

from __future__ import annotations

from rich.console import Console

from nesterov_pp.training.config import Config, RunError
from nesterov_pp.training.folder import RunFolder
from nesterov_pp.training.metrics import MetricsLog, ScalarLog
from nesterov_pp.training.report import RunProgress

_SCALARS_EVERY = 10


class Outputs:
    """The outputs of the process that reports.

    Args:
        keep: bytes of the metrics file to keep.
        start: microbatches done before this process began.
    """

    def __init__(self, config: Config, folder: RunFolder, console: Console, keep: int, start: int) -> None:
        self._log = MetricsLog(folder.metrics, keep=keep)
        self._scalars = ScalarLog(folder.tensorboard, start)
        self._progress = RunProgress(console, start, config.microbatches)

    def trained(self, done: int, loss: float, lr: float, rate: float) -> None:
        """Record a microbatch's loss and learning rate, and the tokens per second so far."""
        self._progress.step(done, loss, rate)
        self._log.write(microbatch=done, loss=loss, lr=lr)
        if done % _SCALARS_EVERY == 0:
            self._scalars.add("loss/train", loss, done)
            self._scalars.add("lr", lr, done)
            self._scalars.add("tokens_per_second", rate, done)

    def validated(self, done: int, loss: float) -> None:
        """Record a validation loss."""
        self._progress.validated(loss)
        self._log.write(microbatch=done, validation_loss=loss)
        self._scalars.add("loss/validation", loss, done)

    def measured(self, done: int, stage: int, cosine: float) -> None:
        """Record a ``--diagnostics`` measurement of a stage (from 1)."""
        self._log.write(microbatch=done, stage=stage, cosine=cosine)
        self._scalars.add(f"cosine/stage_{stage}", cosine, done)

    def sync(self) -> int:
        """Write every line to disk; return the number of bytes up to here."""
        self._scalars.flush()
        return self._log.sync()

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.close()
        for file in (self._log, self._scalars):
            try:
                file.close()
            except RunError:
                if kind is None:
                    raise  # otherwise the first error says what is wrong


class Silence:
    """The outputs of the other processes: nothing."""

    def trained(self, done: int, loss: float, lr: float, rate: float) -> None: ...

    def validated(self, done: int, loss: float) -> None: ...

    def measured(self, done: int, stage: int, cosine: float) -> None: ...

    def sync(self) -> int:
        return 0

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None: ...
