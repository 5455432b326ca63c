"""The command line: ``python -m nesterov_pp train | compare | generate | export | reshard | plan | swarm | ...``."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, cast

import nesterov_pp
from nesterov_pp.methods.costs import delays_taken, extra_versions, of_step
from nesterov_pp.pipeline import recipes

_PROGRAM = "nesterov_pp"
COMPARED: dict[str, Any] = {"methods": ["nesterov", "pipedream", "gpipe", "gpipe-1"], "seeds": [0, 1, 2]}
"""The methods and seeds that ``compare`` runs by default."""

SGD_METHODS = ("nesterov-sgd", "spectrain", "dana-zero", "dana-slim", "dana-dc")
"""Methods without a preconditioner: a language model needs quite different learning rates for them."""

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "methods": ["nesterov-rotated", "gpipe-rotated", "nesterov", "gpipe", "pipedream"],
        "microbatches": 1600,
        "context": 32,
        "lr": [6e-4, 2e-3, 6e-3, 1.8e-2],
        "embedding_lr": 10.0,
        "planned_time": True,
    },
    "small": {
        "methods": [name for name in recipes() if name not in (*SGD_METHODS, "gba")],
        "microbatches": 2400,
        "context": 32,
        "lr": [1e-3, 3e-3],
        "sample_length": 0,
    },
}
"""Named settings of ``compare``; a flag given on the command line overrides the preset's."""


class _Parser(argparse.ArgumentParser):
    """A parser that reports a bad flag in one line, which points at the help of the command that refuses the flag."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{_PROGRAM}: error: {' '.join(message.split())} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 1 (a run failed), 2 (bad input), or 128 + signal."""
    from nesterov_pp.training.config import UserError
    from nesterov_pp.training.signals import InterruptionError

    _make_printable()
    try:
        arguments = vars(_parser().parse_args(argv))
        command: Callable[[dict[str, Any]], None] = arguments.pop("command")
        command(arguments)
        sys.stdout.flush()
    except (UserError, InterruptionError) as error:
        return _complain(str(error), error.status)
    except KeyboardInterrupt:
        return _complain(
            "stopped immediately by Ctrl-C; what was written is kept, and --resume continues from there", 130
        )
    except BrokenPipeError:
        _discard_output()
        return 141
    except OSError as error:
        if error.filename is None:  # every other file's errors name it
            _discard_output()
        where = "standard output" if error.filename is None else error.filename
        return _complain(f"{where} cannot be used: {error.strerror or error}", 1)
    return 0


def _make_printable() -> None:
    """Have what standard output cannot encode, or a closed one, never end a run."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Keep the interpreter from failing when it flushes, at exit, what cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(sentence: str, status: int) -> int:
    if sentence:  # empty where another process reports the error
        kind = "error: " if status < 128 else ""
        print(f"{_PROGRAM}: {kind}{' '.join(sentence.split())}", file=sys.stderr)
    return status


def _slack(text: str) -> int | str:
    from nesterov_pp.training.config import whole

    try:
        return text if text == "auto" else whole(0, 10_000)(text)
    except ValueError as error:
        raise ValueError(str(error).replace("needs", "needs auto or", 1)) from None


def _parser() -> argparse.ArgumentParser:
    from nesterov_pp.analysis.command import add_arguments as analysis_arguments
    from nesterov_pp.planning.command import add_arguments as plan_arguments
    from nesterov_pp.swarm.command import add_arguments as swarm_arguments
    from nesterov_pp.training.config import Config
    from nesterov_pp.training.pace import MODEL, STORAGE

    parser = _Parser(prog=f"python -m {_PROGRAM}", description=nesterov_pp.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {nesterov_pp.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    shown = {f.name: f for f in fields(Config)}

    def command(name: str, run: Callable[[dict[str, Any]], None], help_text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help_text, description=help_text, allow_abbrev=False, argument_default=argparse.SUPPRESS
        )
        sub.set_defaults(command=run)
        return sub

    def add_setting(sub: argparse.ArgumentParser, name: str) -> None:
        setting = shown[name]
        switch = isinstance(setting.default, bool)
        default = "" if setting.default is None or switch else f" (default: {setting.default})"
        more: dict[str, Any] = {"nargs": "?", "const": True} if switch else {}
        sub.add_argument(
            "--" + name.replace("_", "-"),
            type=_typed(setting.metadata["parse"]),
            help=setting.metadata["help"] + default,
            metavar=("yes|no|24bit" if name == "master_weights" else "yes|no") if switch else "X",
            **more,
        )

    def add_settings(sub: argparse.ArgumentParser, *left_out: str) -> None:
        for name in shown:
            if name not in left_out:
                add_setting(sub, name)
        sub.add_argument(
            "--out",
            type=Path,
            metavar="DIR",
            help="folder for the results (default: runs/METHOD in train, runs/compare in compare)",
        )
        sub.add_argument(
            "--resume", action="store_true", help="continue what is in the --out folder; start anew if it is empty"
        )

    sub = command(
        "train", _train, "train a small language model through a virtual pipeline; under torchrun, a real one"
    )
    add_settings(sub, "slack")
    what = f"{shown['slack'].metadata['help']} (default: auto, as many as links of the run that are slow need)"
    sub.add_argument("--slack", type=_typed(_slack), metavar="X", help=what)
    sub = command("compare", _compare, "train with several methods and seeds, and put the results into one table")
    sub.add_argument(
        "--methods",
        type=_typed(_names),
        metavar="A,B,...",
        help=f"methods to compare (default: {','.join(COMPARED['methods'])})",
    )
    sub.add_argument(
        "--seeds",
        type=_typed(_several("seed")),
        metavar="N,N,...",
        help="seeds to run each method with (default: 0,1,2)",
    )
    sub.add_argument(
        "--jobs", type=_typed(_count), metavar="N", help="number of runs at a time (default: the number of cores)"
    )
    sub.add_argument(
        "--preset",
        type=_typed(_preset),
        metavar="NAME",
        help=f"named settings, which other flags override: {', '.join(PRESETS)} (default: none)",
    )
    sub.add_argument(
        "--planned-time",
        action="store_true",
        help="also show the loss over the time that one device for each stage would take, as plan simulates it",
    )
    sub.add_argument(
        "--every-rate",
        action="store_true",
        help="every seed tries every learning rate of --lr, and the best is the best on average",
    )
    for name, many in (
        ("lr", "if several, the first seed tries all of them and the other seeds use each method's best"),
        ("stages", "if several, each has a table of its own"),
    ):
        setting = shown[name]
        what = f"{setting.metadata['help']} (default: {setting.default}); {many}"
        sub.add_argument(f"--{name}", type=_typed(_several(name)), metavar="X[,...]", help=what)
    add_settings(sub, "method", "seed", "lr", "stages")
    sub = command("analyze", _analyze, "show what a delay does to the step size in theory, in tables and a plot")
    analysis_arguments(sub, _typed)
    sub = command("plan", _plan, "predict time, memory and delays of a pipeline of this model on other machines")
    plan_arguments(sub, _typed)
    for name in (*MODEL, *STORAGE, "stash"):
        add_setting(sub, name)
    sub = command("reshard", _reshard, "regroup a run's newest checkpoint for another number of stages")
    sub.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of the run to regroup")
    sub.add_argument(
        "--stages", type=_typed(_count), required=True, metavar="N", help="number of stages of the new run"
    )
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the new run, empty or absent")
    sub.add_argument(
        "--slack",
        type=_typed(_setting("slack")),
        metavar="X",
        help="further microbatches in flight in the new run (default: as many as in the old one)",
    )
    sub.add_argument(
        "--one-process",
        action="store_true",
        help="write the new run for one process (default: for one process per stage)",
    )
    sub = command("export", _export, "write the weights of a run as one state dict of the uncut model")
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    what = "a .pt or .safetensors file, or an empty or absent folder for a model that generate takes"
    sub.add_argument("--out", type=Path, metavar="PATH", help=f"{what} (default: RUN/model.pt)")
    sub = command("generate", _generate, "continue a text with the model of a run")
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or one that export wrote")
    sub.add_argument("--prompt", metavar="TEXT", help="the text to continue (default: a line end)")
    sub.add_argument("--length", type=_typed(_count), metavar="N", help="number of tokens to generate (default: 200)")
    for name, what in (("temperature", shown["temperature"].metadata["help"]), ("seed", "seed of the draws")):
        setting = shown[name]
        sub.add_argument(
            f"--{name}", type=_typed(setting.metadata["parse"]), metavar="X", help=f"{what} (default: that of the run)"
        )
    sub = command("methods", _methods, "list the methods, and what each keeps and moves for a parameter")
    for name in STORAGE:
        add_setting(sub, name)
    sub = command("swarm", _swarm, "train on machines that come and go: stages are groups of workers, without torchrun")
    swarm_arguments(sub, _typed, add_setting)
    command("info", _info, "show versions, and which backends are available and why")
    return parser


def _typed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return ``parse`` with its ``ValueError`` turned into argparse's message."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"needs distinct names separated by commas, not {text!r}")
    return names


def _several(name: str) -> Callable[[str], list[Any]]:
    """Return the function that parses distinct values of a setting of a run."""

    def parse(text: str) -> list[Any]:
        values = [_setting(name)(part.strip()) for part in text.split(",")]
        if len(set(values)) < len(values):
            raise ValueError(f"needs distinct numbers separated by commas, not {text!r}")
        return values

    return parse


def _setting(name: str) -> Callable[[str], Any]:
    """Return the function that parses a setting of a run."""
    from nesterov_pp.training.config import Config

    (parse,) = (f.metadata["parse"] for f in fields(Config) if f.name == name)
    return cast(Callable[[str], Any], parse)


def _count(text: str) -> int:
    from nesterov_pp.training.config import whole

    return whole(1)(text)


def _preset(text: str) -> dict[str, Any]:
    if text not in PRESETS:
        raise ValueError(f"needs one of {', '.join(PRESETS)}, not {text!r}")
    return PRESETS[text]


def _require(*packages: str, extra: str = "train") -> None:
    """Raise UserError if an optional package is not installed."""
    from nesterov_pp.training.config import UserError

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"this command needs {' and '.join(missing)}; run `pip install 'nesterov-pp[{extra}]'`")


def _train(arguments: dict[str, Any]) -> None:
    _require("matplotlib", "rich", "tensorboard", "tokenizers")
    from nesterov_pp.training.config import Config
    from nesterov_pp.training.trainer import train

    resume = arguments.pop("resume", False)
    out = arguments.pop("out", None) or Path("runs") / arguments.get("method", Config.method)
    train(arguments, out, resume=resume)


def _compare(arguments: dict[str, Any]) -> None:
    _require("matplotlib", "rich", "tensorboard", "tokenizers")
    from nesterov_pp.pipeline.distributed.world import launched
    from nesterov_pp.training.compare import compare
    from nesterov_pp.training.config import UserError

    if launched():
        raise UserError("compare starts its own processes; start it without torchrun")
    preset = arguments.pop("preset", {})
    given = {**COMPARED, **preset, **arguments}
    own = {
        name: given.pop(name)
        for name in ("methods", "seeds", "jobs", "out", "resume", "lr", "stages", "planned_time", "every_rate")
        if name in given
    }
    compare(
        given,
        own["methods"],
        own["seeds"],
        own.get("jobs", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1),
        own.get("out", Path("runs/compare")),
        planned_time=own.get("planned_time", False),
        every_rate=own.get("every_rate", False),
        rates=own.get("lr", ()),
        depths=own.get("stages", ()),
        resume=own.get("resume", False),
    )


def _analyze(arguments: dict[str, Any]) -> None:
    _require("matplotlib", "rich", "scipy", extra="analysis")
    from nesterov_pp.analysis import command
    from nesterov_pp.terminal import make_console, say
    from nesterov_pp.training.checkpoint import write_atomic
    from nesterov_pp.training.config import UserError
    from nesterov_pp.training.folder import make_folder

    path: Path = arguments.pop("out", Path("runs/analysis.png"))
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"--out {path} cannot be used for the plot; give the name of a .png file")
    make_folder(path.parent)
    console = make_console()
    picture = command.analyze(console, **arguments)
    write_atomic(path, lambda file: file.write(picture))
    say(console, f"The plot is in {path}.")


def _reshard(arguments: dict[str, Any]) -> None:
    _require("matplotlib", "rich", "tensorboard", "tokenizers")
    from nesterov_pp.training.reshard import reshard

    print(reshard(arguments.pop("run"), arguments.pop("stages"), arguments.pop("out"), **arguments))


def _export(arguments: dict[str, Any]) -> None:
    from nesterov_pp.training.export import export

    print(export(arguments["run"], arguments.get("out")))


def _generate(arguments: dict[str, Any]) -> None:
    _require("tokenizers")
    from nesterov_pp.training.export import load

    trained = load(arguments.pop("run"))
    print(trained.continued(arguments.pop("prompt", "\n"), arguments.pop("length", 200), **arguments))


def _plan(arguments: dict[str, Any]) -> None:
    _require("rich")
    from nesterov_pp.planning.command import plan
    from nesterov_pp.terminal import make_console
    from nesterov_pp.training.config import UserError
    from nesterov_pp.training.driver import enough_memory
    from nesterov_pp.training.pace import MODEL

    model = {name: arguments.pop(name) for name in MODEL if name in arguments}
    try:
        with enough_memory(UserError, "this model; use a smaller --width or fewer --layers"):
            plan(make_console(), model, **arguments)
    except ValueError as error:
        raise UserError(str(error)) from None


def _methods(storage: dict[str, Any]) -> None:
    _require("rich")
    from nesterov_pp.terminal import Table, make_console, say
    from nesterov_pp.training.config import Config, UserError

    Config(**storage).check_optimizer()

    table = Table(title="Methods: an update every K microbatches; P stages, numbered i = 1 ... P")
    table.add_column("Name", no_wrap=True)
    for heading in ("Description and source", "K", "Extra weights", "State", "Step", "Delay", "Runs in"):
        table.add_column(heading)
    for recipe in recipes().values():
        config = Config(method=recipe.name, **storage)
        try:
            config.check_optimizer()
            cost, without = of_step(config.own_recipe, config.dtype), "more"
        except UserError:
            cost, without = None, "refused"
        table.add_row(
            recipe.name,
            f"{recipe.summary}; {recipe.reference}",
            str(recipe.microbatches_per_update or "P"),
            extra_versions(recipe),
            f"{cost.state:g}" if cost else without,
            f"{cost.traffic:g}" if cost and cost.traffic else without,
            delays_taken(recipe),
            "both" if recipe.distributed else "virtual",
        )
    console = make_console()
    console.print(table)
    say(
        console,
        "Extra weights: the number of weight versions that stage i keeps besides the newest, in a real pipeline. "
        f"State: bytes per {Config(**storage).weights_dtype} parameter besides all weight versions, including masters "
        "and a predicted copy. Step: bytes per parameter that a step reads and writes; more: several passes; refused: "
        "the method does not take these settings. Delay: the delays that the method takes; "
        "constant: it is told the expected one. Runs in: both pipelines, or the virtual one only.",
    )


def _swarm(arguments: dict[str, Any]) -> None:
    _require("matplotlib", "rich", "tensorboard", "tokenizers")
    from nesterov_pp.swarm.command import run

    if arguments.pop("needs_torchft"):
        _require("torchft", extra="swarm")
    run(arguments)


def _info(_: dict[str, Any]) -> None:
    from nesterov_pp.info import info

    print(info())
