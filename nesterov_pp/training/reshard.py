"""The newest checkpoint of a run, regrouped for another number of stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nesterov_pp.pipeline import VirtualPipeline
from nesterov_pp.pipeline.stage_state import as_saved_now, joined
from nesterov_pp.training import checkpoint
from nesterov_pp.training.config import Config, UserError, recorded_settings, settle
from nesterov_pp.training.driver import pipeline_options, refusals_explained, stage_modules
from nesterov_pp.training.folder import RunFolder, is_fresh, make_folder
from nesterov_pp.training.model import Name, layers_of, names_in_model, next_token_loss
from nesterov_pp.training.tokenizer import BpeTokenizer, ByteTokenizer


def reshard(source: Path, stages: int, out: Path, *, slack: int | None = None, one_process: bool = False) -> str:
    """Write ``source``'s newest checkpoint, regrouped into ``stages`` stages, to ``out``; return a message about it.

    Weights, optimizer state and position stay the same. The ring starts again with the newest version in every slot,
    so the first updates of the new stages are late by less than their delay, as after a drain.

    Args:
        source: the folder of a run, in one process or several.
        out: an empty or new folder.
        slack: further microbatches in flight in the new run (default: as many as in the old one).
        one_process: write it for a run in one process; default: for one process per stage.

    Raises:
        UserError: there is no complete checkpoint, ``out`` is not empty, there are fewer layers than stages, or the
            method's state cannot be regrouped.
    """
    folder = RunFolder(source)
    record = folder.recorded(resume=True) if source.is_dir() else None
    if record is None:
        raise UserError(f"{source} holds no run; give the folder of a run")
    if not is_fresh(out):
        raise UserError(f"{out} is not empty; give an empty or new folder with --out")
    config = settle({}, recorded_settings(record, folder.config))
    state = _newest(source)
    processes = 1 if one_process else stages
    new = replace(config, stages=stages, replicas=1, slack=config.slack if slack is None else slack)
    new.check()
    pipe = _refilled(new, config, folder, state)
    make_folder(out)
    with RunFolder(out).claimed():
        record = {**record, "config": asdict(new), "processes": processes}
        lines = folder.metrics.read_bytes()[: int(state["metrics_bytes"])]
        checkpoint.write_atomic(RunFolder(out).metrics, lambda file: file.write(lines))
        if folder.tokenizer.exists():
            shutil.copyfile(folder.tokenizer, RunFolder(out).tokenizer)
        rest = {"metrics_bytes": len(lines), "record": record, "totals": state["totals"]}
        done = int(state["microbatch"])
        for part, pipeline in _parts(pipe, new, processes):
            checkpoint.save(out, done, {**rest, "pipeline": pipeline}, part=part)
        checkpoint.write_text(RunFolder(out).config, json.dumps(record, indent=2) + "\n")
    how = f"torchrun --nproc-per-node {processes} -m" if processes > 1 else "python -m"
    return (
        f"{out} holds the run of {source} after microbatch {done}, in {stages} stages instead of {config.stages}. "
        "The ring starts again from the newest weights, so the first updates are late by less than their delay. "
        f"Resume with: {how} nesterov_pp train --resume --out {out}"
    )


def _newest(source: Path) -> dict[str, Any]:
    """Return the newest complete checkpoint, in the form that one process writes."""
    paths = checkpoint.newest_complete(source)
    if not paths:
        raise UserError(f"{source} holds no checkpoint that all of its stages have written")
    states = [checkpoint.load(path) for path in paths]
    together = joined(as_saved_now(state["pipeline"]) for state in states)
    return {**states[-1], "pipeline": together}  # the last stage's process has written the metrics


def _in_order(optimizer: Mapping[str, Any], names: list[str]) -> list[str]:
    """Return the names of a stage's parameters in the order of its optimizer's state; ``names`` are in the ring's."""
    grouped = [name for group in optimizer.get("param_groups", ()) for name in group.get("param_names") or ()]
    return grouped or names


def _refilled(new: Config, old: Config, folder: RunFolder, state: Mapping[str, Any]) -> VirtualPipeline:
    weights: dict[Name, Tensor] = {}
    shadows: dict[Name, Tensor] = {}
    moments: dict[Name, dict[str, Any]] = {}
    saved = state["pipeline"]
    stages = [saved["stages"][i] for i in range(old.stages)]
    if any("forecast" in stage for stage in stages):
        raise UserError(f"{old.method} keeps a history of each stage's gradients; its runs cannot be regrouped")
    for layers, stage in zip(layers_of(old.stages, old.layers), stages, strict=True):
        stash, optimizer = stage["stash"], stage["optimizer"]
        newest = stash["weights"][-1]
        names = names_in_model(newest, layers)
        if set(optimizer.get("state", ())) != set(range(len(names))):
            raise UserError(f"{old.method} keeps more than one state per parameter; its runs cannot be regrouped")
        if "shadow" in stash:
            shadows.update(zip(names, stash["shadow"].values(), strict=True))
        weights.update(zip(names, newest.values(), strict=True))
        ordered = names_in_model(_in_order(optimizer, list(newest)), layers)
        moments.update((name, optimizer["state"][k]) for k, name in enumerate(ordered))
    size = (ByteTokenizer() if new.tokenizer == "bytes" else BpeTokenizer.load(folder.tokenizer)).size
    pipe = refusals_explained(
        lambda: VirtualPipeline(stage_modules(new, size), next_token_loss, **pipeline_options(new))
    )
    version = stages[0]["stash"]["newest"]
    for layers, stash, optimizer in zip(layers_of(new.stages, new.layers), pipe.stashes, pipe.optimizers, strict=True):
        assert optimizer is not None
        names = names_in_model(stash.names, layers)
        ring = [dict(zip(stash.names, (weights[name] for name in names), strict=True))]
        shadow = dict(zip(stash.names, (shadows[name] for name in names), strict=True)) if shadows else {}
        kept = {"shadow": shadow} if shadow else {}
        stash.load_state_dict({"newest": version, "weights": ring * min(version + 1, stash.versions), **kept})
        own = optimizer.state_dict()
        ordered = names_in_model(_in_order(own, stash.names), layers)
        optimizer.load_state_dict({**own, "state": {k: moments[name] for k, name in enumerate(ordered)}})
    pipe.microbatches, pipe.updates = int(saved["microbatches"]), version
    return pipe


def _parts(pipe: VirtualPipeline, config: Config, processes: int) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield, for each file of the checkpoint, the mark in its name and the state of the pipeline in it."""
    if processes == 1:
        yield "", pipe.state_dict()
        return
    whole = pipe.state_dict()
    for k, stash in enumerate(pipe.stashes):
        own, kept = whole["stages"][k], {}
        if pipe.recipe.linearise_at == "newest":  # with several processes, the ring has one version there
            ring = own["stash"]
            kept = dict.fromkeys(range(stash.oldest, stash.newest), ring["weights"][-1])
            own = {**own, "stash": {**ring, "weights": ring["weights"][-1:]}}
        yield checkpoint.stage_part(k, config.stages), {**whole, "stages": {k: {**own, "kept": kept}}}
