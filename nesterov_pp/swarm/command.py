"""``python -m nesterov_pp swarm coordinate | work | replay | picture``."""

from __future__ import annotations

import argparse
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nesterov_pp.terminal import make_console, say
from nesterov_pp.training.signals import InterruptionError, StopRequest

Typed = Callable[[Callable[[str], Any]], Callable[[str], Any]]
TOKEN_VARIABLE = "NESTEROV_PP_SWARM_TOKEN"
SHORTEST_TOKEN = 16
_DEFAULTS = {"host": "127.0.0.1", "port": 29600, "in_flight": 2.0, "versions": 16, "lost": "resend", "straggler": 2.0}


def add_arguments(
    parser: argparse.ArgumentParser, typed: Typed, add_setting: Callable[[argparse.ArgumentParser, str], None]
) -> None:
    """Add the commands of a swarm, each with a ``swarm_command`` that runs it, and whether it ``needs_torchft``."""
    from nesterov_pp.swarm.protocol import is_address
    from nesterov_pp.swarm.runs import SETTINGS
    from nesterov_pp.training.config import whole

    def address(text: str) -> str:
        if not is_address(text):
            raise ValueError(f"needs HOST:PORT, not {text!r}")
        return text

    def positive(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0.0 < value < 1e9:
            raise ValueError(f"needs a number above 0, not {text!r}")
        return value

    commands = parser.add_subparsers(required=True, metavar="WHAT", parser_class=type(parser))

    def command(name: str, run: Callable[[dict[str, Any]], None], help_text: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(
            name, help=help_text, description=help_text, allow_abbrev=False, argument_default=argparse.SUPPRESS
        )
        sub.set_defaults(swarm_command=run, needs_torchft=run in (_coordinate, _work))
        return sub

    def add_token(sub: argparse.ArgumentParser) -> None:
        what = f"file with the swarm's secret (default: the variable {TOKEN_VARIABLE})"
        sub.add_argument("--token-file", type=Path, metavar="FILE", help=what)

    port = typed(whole(1, 65_000))
    sub = command("coordinate", _coordinate, "let workers in, wire microbatches, and keep the trace of a run")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/swarm)")
    sub.add_argument("--resume", action="store_true", help="go on with the run in --out")
    sub.add_argument("--host", metavar="H", help="address to listen at (default: 127.0.0.1)")
    sub.add_argument(
        "--port", type=port, metavar="N", help="port; the lighthouse of stage i has N + i (default: 29600)"
    )
    what = "microbatches in flight for each worker (default: 2)"
    sub.add_argument("--in-flight", type=typed(positive), metavar="X", help=what)
    what = "versions of the weights that a stage keeps, if the method has a stash (default: 16)"
    sub.add_argument("--versions", type=typed(whole(1, 10_000)), metavar="N", help=what)
    what = "resend a microbatch that a dead worker had, or drop it (default: resend)"
    sub.add_argument("--lost", choices=("resend", "drop"), help=what)
    what = "updates between two checkpoints of a stage (default: 100)"
    sub.add_argument("--checkpoint-every", type=typed(whole(1)), metavar="N", help=what)
    sub.add_argument(
        "--idle", type=typed(positive), metavar="S", help="give up after S seconds of nothing (default: 600)"
    )
    what = "seconds for which a stage holds its updates for a worker that takes over its state (default: 2)"
    sub.add_argument("--straggler", type=typed(positive), metavar="S", help=what)
    add_token(sub)
    for name in SETTINGS:
        add_setting(sub, name)
    sub = command("work", _work, "compute one stage of the run of a coordinator")
    sub.add_argument("--join", type=typed(address), required=True, metavar="HOST:PORT", help="the coordinator")
    what = "stage to compute, from 1 (default: the one with the fewest workers)"
    sub.add_argument("--stage", type=typed(whole(1)), metavar="N", help=what)
    what = "address under which the other workers reach this one (default: 127.0.0.1)"
    sub.add_argument("--host", metavar="H", help=what)
    sub.add_argument("--port", type=port, metavar="N", help="port to listen at (default: a free one)")
    sub.add_argument("--data", metavar="PATH", help="where this machine has the text of the run")
    what = "make computing take X times as long, to try out an uneven swarm (default: 1)"
    sub.add_argument("--slow", type=typed(positive), metavar="X", help=what)
    what = "seconds to look for a coordinator that is away (default: 60)"
    sub.add_argument("--patience", type=typed(positive), metavar="S", help=what)
    add_token(sub)
    sub = command("replay", _replay, "compute a run again from its trace, in one process, and compare every bit")
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    sub = command("picture", _picture, "draw the timeline of a run into RUN/timeline.png")
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of the run")


def run(arguments: dict[str, Any]) -> None:
    """Run the command that was chosen."""
    command: Callable[[dict[str, Any]], None] = arguments.pop("swarm_command")
    command(arguments)


def token_of(path: Path | None) -> bytes:
    """Return the swarm's secret.

    Raises:
        UserError: there is none, it is too short, or others can read its file.
    """
    from nesterov_pp.training.config import UserError

    if path is None:
        token = os.environ.get(TOKEN_VARIABLE, "").strip().encode()
        where = f"the variable {TOKEN_VARIABLE}"
    else:
        try:
            token, where = path.read_bytes().strip(), str(path)
            if stat.S_IMODE(path.stat().st_mode) & 0o077:
                raise UserError(f"others can read the secret in {path}; run chmod 600 {path}")
        except OSError as error:
            raise UserError(f"--token-file {path} cannot be read: {error.strerror}") from None
    if len(token) < SHORTEST_TOKEN:
        raise UserError(
            f"{where} must hold the swarm's secret, at least {SHORTEST_TOKEN} characters that only its members know; "
            "make one with: python -c 'import secrets; print(secrets.token_hex(32))'"
        )
    return token


@contextmanager
def _signals(act: Callable[[], None]) -> Iterator[StopRequest]:
    """Call ``act``, in a thread, once a signal has asked this process to stop inside the block."""
    ended = threading.Event()
    with StopRequest() as stop:

        def watch() -> None:
            while not ended.wait(0.1):
                if stop.received is not None:
                    act()
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield stop
        finally:
            ended.set()
            thread.join()


def _coordinate(arguments: dict[str, Any]) -> None:
    from nesterov_pp.swarm import runs
    from nesterov_pp.swarm.coordinator import Coordinator, Settings, SwarmError
    from nesterov_pp.swarm.lineage import MalformedError
    from nesterov_pp.training.config import Config, RunError, UserError
    from nesterov_pp.training.folder import RunFolder
    from nesterov_pp.training.metrics import ScalarLog

    console = make_console()
    token = token_of(arguments.pop("token_file", None))
    folder = RunFolder(arguments.pop("out", Path("runs/swarm")))
    own = {name: arguments.pop(name, default) for name, default in _DEFAULTS.items()}
    every, idle = arguments.pop("checkpoint_every", 100), arguments.pop("idle", 600.0)
    recorded = folder.recorded(resume=arguments.pop("resume", False))
    if recorded is None:
        config = Config(**{"method": "swarm", "stages": 2, **arguments})
    else:
        config = runs.config_of(recorded)
        own["versions"] = recorded["versions"]
        if unlike := [name for name, value in arguments.items() if getattr(config, name) != value]:
            raise UserError(f"the run in {folder.path} has another --{unlike[0].replace('_', '-')}; omit it")
    corpus, digest = runs.corpus_of(config)
    record = runs.record_of(config, own["versions"], digest)
    settings = Settings(
        stages=config.stages,
        total=config.microbatches,
        host=own["host"],
        port=own["port"],
        per_worker=own["in_flight"],
        seed=config.seed,
        resend=own["lost"] == "resend",
        checkpoint_every=every,
        straggler=own["straggler"],
        idle=idle,
    )
    with folder.claimed():
        runs.write_record(folder.path, record)
        scalars = ScalarLog(folder.tensorboard, 0)
        seen = 0

        def observe(_microbatch: int, loss: float, delays: list[float]) -> None:
            nonlocal seen
            seen += 1
            scalars.add("loss/train", loss, seen)
            for s, delay in enumerate(delays, start=1):
                scalars.add(f"delay/stage {s}", delay, seen)

        def log(sentence: str) -> None:
            say(console, sentence)

        stop: StopRequest | None = None
        try:
            coordinator = Coordinator(settings, record, token, folder.path, log=log, observe=observe)
            log(f"Workers join with: python -m nesterov_pp swarm work --join {settings.host}:{settings.port}")
            with _signals(lambda: coordinator.stop("stopped")) as stop:
                states = coordinator.run()
        except (SwarmError, MalformedError) as error:
            if stop is not None and stop.received:
                how = f"python -m nesterov_pp swarm coordinate --resume --out {folder.path}"
                raise InterruptionError(stop.received, f"stopped; go on with: {how}") from None
            raise RunError(str(error)) from None
        finally:
            scalars.close()
        loss = runs.finish(folder.path, config, states, corpus)
        scheduler = coordinator.scheduler
        log(
            f"Finished: validation loss {loss:.4f}; {len(scheduler.lost)} gradients lost, {scheduler.twice} counted "
            f"twice, {scheduler.again} microbatches sent again, {scheduler.taken_over} taken over by a peer. The trace "
            f"is in {coordinator.trace_path}."
        )


def _work(arguments: dict[str, Any]) -> None:
    from nesterov_pp.swarm.runs import task_of
    from nesterov_pp.swarm.worker import Worker, WorkerError
    from nesterov_pp.training.config import RunError

    console = make_console()
    token, data = token_of(arguments.pop("token_file", None)), arguments.pop("data", None)
    stage = arguments.pop("stage", None)
    worker = Worker(
        arguments.pop("join"),
        token,
        lambda record: task_of(record, data),
        stage=None if stage is None else stage - 1,
        log=lambda sentence: say(console, sentence),
        **arguments,
    )

    try:
        with _signals(worker.stop) as stop:
            worker.run()
    except WorkerError as error:
        raise RunError(str(error)) from None
    say(console, "This worker has left." if stop.received else "The run is finished.")


def _replay(arguments: dict[str, Any]) -> None:
    import torch

    from nesterov_pp.swarm.lineage import MalformedError
    from nesterov_pp.swarm.replay import replay
    from nesterov_pp.swarm.runs import task_of
    from nesterov_pp.swarm.trace import read_state, read_trace
    from nesterov_pp.training.config import RunError, UserError

    folder: Path = arguments["run"]
    try:
        trace = read_trace(folder / "trace.jsonl")
        states = [read_state(folder / f"stage-{s + 1}.state") for s in range(trace.run["stages"])]
        found = replay(task_of(trace.run), trace.updates, [state["version"] for state in states])
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    except (MalformedError, ValueError) as error:
        raise UserError(str(error)) from None
    unequal = [
        f"{name} of stage {s}"
        for s, (state, weights) in enumerate(zip(states, found.weights, strict=True), start=1)
        for name, value in weights.items()
        if not torch.equal(value, state["stash"]["weights"][-1][name])
    ]
    if found.unlike or unequal:
        what = f"the loss of microbatch {found.unlike[0] + 1}" if found.unlike else unequal[0]
        raise RunError(f"the replay differs from the run in {folder}, first in {what}")
    versions = len(trace.updates)
    say(
        make_console(),
        f"The replay of {versions:,} updates in {folder} gives the same {len(found.losses):,} losses and the same "
        "weights, bit for bit.",
    )


def _picture(arguments: dict[str, Any]) -> None:
    from nesterov_pp.swarm.lineage import MalformedError
    from nesterov_pp.swarm.picture import draw, read_timeline
    from nesterov_pp.swarm.trace import read_trace
    from nesterov_pp.training.checkpoint import write_atomic
    from nesterov_pp.training.config import UserError

    folder: Path = arguments["run"]
    try:
        trace = read_trace(folder / "trace.jsonl")
        spans = read_timeline(folder / "timeline.jsonl")
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    except (MalformedError, ValueError) as error:
        raise UserError(str(error)) from None
    last = trace.run["stages"] - 1
    losses = [float.fromhex(one.loss) for u in trace.updates if u.stage == last for one in u.contributions]
    path = folder / "timeline.png"
    write_atomic(path, lambda file: draw(file, spans, trace.events, losses))
    say(make_console(), f"The timeline is in {path}.")
