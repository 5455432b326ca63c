"""The command line: ``python -m nesterov_pp train | compare | plan | analyze | reshard | methods | info``."""

from __future__ import annotations

import argparse
import importlib.util
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
"""What ``compare`` compares by default."""

SGD_METHODS = ("nesterov-sgd", "spectrain", "dana-zero", "dana-slim", "dana-dc")
"""Methods without a preconditioner: a language model needs quite other learning rates for them."""

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {"microbatches": 2400, "context": 32, "lr": [2e-3]},
    "small": {
        "methods": [name for name in recipes() if name not in (*SGD_METHODS, "gba")],
        "microbatches": 2400,
        "context": 32,
        "lr": [1e-3, 3e-3],
        "sample_length": 0,
    },
}
"""Settings of ``compare`` under a name; a flag that is given wins over the preset's."""


class _Parser(argparse.ArgumentParser):
    """One line for a bad flag."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{_PROGRAM}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 (bad input), 1 (a run failed), or 128 + signal."""
    from nesterov_pp.training.config import UserError
    from nesterov_pp.training.signals import InterruptionError

    try:
        arguments = vars(_parser().parse_args(argv))
        command: Callable[[dict[str, Any]], None] = arguments.pop("command")
        command(arguments)
        sys.stdout.flush()
    except (UserError, InterruptionError) as error:
        return _complain(str(error), error.status)
    except KeyboardInterrupt:
        return _complain("stopped at once by Ctrl-C; what was written is kept, and --resume goes on from there", 130)
    except BrokenPipeError:
        # Nobody reads the output any more; the interpreter is not to trip over it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _complain(sentence: str, status: int) -> int:
    if sentence:  # of several processes, one speaks
        kind = "error: " if status < 128 else ""
        print(f"{_PROGRAM}: {kind}{' '.join(sentence.split())}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    from nesterov_pp.analysis.command import add_arguments as analysis_arguments
    from nesterov_pp.planning.command import MODEL
    from nesterov_pp.planning.command import add_arguments as plan_arguments
    from nesterov_pp.training.config import Config

    parser = _Parser(prog=f"python -m {_PROGRAM}", description=nesterov_pp.__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    shown = {f.name: f for f in fields(Config)}

    def command(name: str, run: Callable[[dict[str, Any]], None], help_text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help_text, description=help_text, allow_abbrev=False, argument_default=argparse.SUPPRESS
        )
        sub.set_defaults(command=run)
        return sub

    def add_settings(sub: argparse.ArgumentParser, *left_out: str) -> None:
        for name, setting in shown.items():
            if name in left_out:
                continue
            switch = isinstance(setting.default, bool)
            default = "" if setting.default is None or switch else f" (default: {setting.default})"
            more: dict[str, Any] = {"nargs": "?", "const": True} if switch else {}
            sub.add_argument(
                "--" + name.replace("_", "-"),
                type=_typed(setting.metadata["parse"]),
                help=setting.metadata["help"] + default,
                metavar="yes|no" if switch else "X",
                **more,
            )
        sub.add_argument(
            "--out", type=Path, metavar="DIR", help="folder of results; default: runs/METHOD or runs/compare"
        )
        sub.add_argument("--resume", action="store_true", help="go on with what is in that folder; if empty, begin")

    add_settings(command("train", _train, "train a small language model through a virtual pipeline"))
    sub = command("compare", _compare, "train with several methods and seeds, and put them into one table")
    sub.add_argument("--methods", type=_typed(_names), metavar="A,B,...", help="methods; default: those of the demo")
    sub.add_argument("--seeds", type=_typed(_seeds), metavar="N,N,...", help="seeds (default: 0,1,2)")
    sub.add_argument("--jobs", type=_typed(_count), metavar="N", help="runs at a time (default: the number of cores)")
    sub.add_argument("--preset", type=_typed(_preset), metavar="NAME", help=f"settings by name: {', '.join(PRESETS)}")
    for name, parse, many in (
        ("lr", _rates, "several: the first seed tries all, the others each method's best"),
        ("stages", _depths, "several: a table each"),
    ):
        setting = shown[name]
        what = f"{setting.metadata['help']} (default: {setting.default}); {many}"
        sub.add_argument(f"--{name}", type=_typed(parse), metavar="X[,...]", help=what)
    add_settings(sub, "method", "seed", "lr", "stages")
    sub = command("analyze", _analyze, "what a delay does to the step size in theory: tables and a plot")
    analysis_arguments(sub, _typed)
    sub = command("plan", _plan, "what a pipeline of this model would do on other machines: time, memory, delays")
    plan_arguments(sub, _typed)
    for name in MODEL:
        setting = shown[name]
        what = f"{setting.metadata['help']} (default: {setting.default})"
        flag = "--" + name.replace("_", "-")
        sub.add_argument(flag, type=_typed(setting.metadata["parse"]), metavar="X", help=what)
    sub = command("reshard", _reshard, "regroup a run's newest checkpoint for another number of stages")
    sub.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of the run")
    sub.add_argument("--stages", type=_typed(_count), required=True, metavar="N", help="stages of the new run")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the new run, empty or absent")
    sub.add_argument("--one-process", action="store_true", help="for one process; default: one for each stage")
    command("methods", _methods, "list the methods")
    command("info", _info, "versions, and which backends are available and why")
    return parser


def _typed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse``, whose ``ValueError`` becomes argparse's message."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"needs different names with commas between them, not {text!r}")
    return names


def _seeds(text: str) -> list[int]:
    if not all(name.isdecimal() for name in _names(text)):
        raise ValueError(f"needs whole numbers of at least 0 with commas between them, not {text!r}")
    return [int(name) for name in _names(text)]


def _rates(text: str) -> list[float]:
    return [_setting("lr")(name) for name in _names(text)]


def _depths(text: str) -> list[int]:
    return [_setting("stages")(name) for name in _names(text)]


def _setting(name: str) -> Callable[[str], Any]:
    """How a setting of a run is read."""
    from nesterov_pp.training.config import Config

    (parse,) = (f.metadata["parse"] for f in fields(Config) if f.name == name)
    return cast(Callable[[str], Any], parse)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"needs a whole number of at least 1, not {text!r}")
    return int(text)


def _preset(text: str) -> dict[str, Any]:
    if text not in PRESETS:
        raise ValueError(f"needs one of {', '.join(PRESETS)}, not {text!r}")
    return PRESETS[text]


def _require(*packages: str, extra: str = "train") -> None:
    """Raises: UserError: an optional package is not installed."""
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
        raise UserError("compare starts processes of its own; leave torchrun out")
    preset = arguments.pop("preset", {})
    given = {**COMPARED, **preset, **arguments}
    own = {
        name: given.pop(name) for name in ("methods", "seeds", "jobs", "out", "resume", "lr", "stages") if name in given
    }
    compare(
        given,
        own["methods"],
        own["seeds"],
        own.get("jobs", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1),
        own.get("out", Path("runs/compare")),
        rates=own.get("lr", ()),
        depths=own.get("stages", ()),
        resume=own.get("resume", False),
    )


def _analyze(arguments: dict[str, Any]) -> None:
    _require("matplotlib", "rich", "scipy", extra="analysis")
    from nesterov_pp.analysis import command
    from nesterov_pp.training.checkpoint import write_atomic
    from nesterov_pp.training.config import UserError
    from nesterov_pp.training.folder import make_folder
    from nesterov_pp.training.report import make_console

    path: Path = arguments.pop("out", Path("runs/analysis.png"))
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"--out {path} cannot be the plot; give the name of a .png file")
    make_folder(path.parent)
    console = make_console()
    picture = command.analyze(console, **arguments)
    write_atomic(path, lambda file: file.write(picture))
    console.print(f"The plot is {path}.", soft_wrap=True)


def _reshard(arguments: dict[str, Any]) -> None:
    _require("matplotlib", "rich", "tensorboard", "tokenizers")
    from nesterov_pp.training.reshard import reshard

    one_process = arguments.pop("one_process", False)
    print(reshard(arguments["run"], arguments["stages"], arguments["out"], one_process=one_process))


def _plan(arguments: dict[str, Any]) -> None:
    _require("rich")
    from nesterov_pp.planning.command import MODEL, plan
    from nesterov_pp.training.config import UserError
    from nesterov_pp.training.report import make_console

    model = {name: arguments.pop(name) for name in MODEL if name in arguments}
    try:
        plan(make_console(), model, **arguments)
    except ValueError as error:
        raise UserError(str(error)) from None


def _methods(_: dict[str, Any]) -> None:
    _require("rich")
    from rich.table import Table

    from nesterov_pp.training.report import make_console

    table = Table(title="Methods: an update every K microbatches; P stages, numbered i = 1 ... P")
    table.add_column("Name", no_wrap=True)
    for heading in ("What, and its source", "K", "Extra weights", "State", "Step", "Delay", "Runs in"):
        table.add_column(heading)
    for recipe in recipes().values():
        cost = of_step(recipe)
        table.add_row(
            recipe.name,
            f"{recipe.summary}; {recipe.reference}",
            str(recipe.microbatches_per_update or "P"),
            extra_versions(recipe),
            str(cost.state) if cost else "more",
            str(cost.traffic) if cost else "more",
            delays_taken(recipe),
            "both" if recipe.distributed else "virtual",
        )
    console = make_console()
    console.print(table)
    console.print(
        "Extra weights: how many versions of its weights stage i keeps besides the newest, in a real pipeline. "
        "State: bytes per float32 parameter besides all versions; a copy that is predicted is in it. Step: bytes per "
        "parameter that a step reads and writes; more: several passes. Delay: what the method takes; constant: it is "
        "told the expected one. Runs in: both pipelines, or the virtual one."
    )


def _info(_: dict[str, Any]) -> None:
    from nesterov_pp.info import info

    print(info())
