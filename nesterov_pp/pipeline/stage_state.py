"""The checkpoint format of a pipeline, which is the same for one process and for several.

A saved pipeline is ``{"terms": {...}, "microbatches": int, "updates": int, "stages": {i: stage}}``. ``"stages"`` holds
the stages (numbered from 0) of one process, so the stages of several files together make up a whole pipeline. A stage
is ``{"stash", "optimizer", "buffers"}``. It also has ``"forecast"`` if the method forecasts gradients, and ``"kept"``,
copies of older versions, if microbatches in flight began with weights that no ring holds. ``"norms"`` are those of past
gradients, if the norm of the whole pipeline is clipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from nesterov_pp.optim.coded import RESIDUAL
from nesterov_pp.pipeline.clipping import Norms
from nesterov_pp.pipeline.recipe import Forecast, StageOptimizer
from nesterov_pp.stash import WeightStash

Saved = dict[str, Any]


@dataclass(frozen=True)
class Terms:
    """The settings that a saved pipeline and the pipeline that resumes it must share."""

    method: str
    microbatches_per_update: int
    delays: list[int]
    flush_every: int | None
    seed: int | None
    replicas: int = 1
    wire: str | None = None

    def check(self, saved: Mapping[str, Any]) -> None:
        """Raise ValueError if ``saved`` has another value for a setting. Settings that it lacks are not compared."""
        for name, value in asdict(self).items():
            if saved.get(name, value) != value:
                raise ValueError(f"the saved pipeline has {name} {saved[name]!r}, this one {value!r}")


@dataclass(frozen=True)
class StageState:
    """The parts of one stage: its ring, optimizer (None without trainable parameters), module, forecast and norms."""

    stash: WeightStash
    optimizer: StageOptimizer | None
    module: nn.Module
    forecast: Forecast | None = None
    norms: Norms | None = None

    def memory(self) -> dict[str, int]:
        """Return the bytes held: ``weights`` (one version), ``stash`` (the other versions), ``moments``, ``masters``.

        ``stash`` includes the shadow and, if older versions are kept in another form, what they have been decoded into.
        ``moments`` are all tensors of the optimizer's state but the masters.
        """
        ring = set(self.stash.names)
        one = sum(map(_bytes, self.stash.parameters(self.stash.newest).values()))
        outside = sum(_bytes(p) for name, p in self.module.named_parameters() if name not in ring)
        states = () if self.optimizer is None else self.optimizer.state.values()
        tensors = [(n, t) for state in states for n, t in state.items() if isinstance(t, Tensor) and t.dim() > 0]
        masters = sum(_bytes(t) for name, t in tensors if name in ("master_weight", RESIDUAL))
        return {
            "weights": one + outside,
            "stash": self.stash.nbytes,
            "moments": sum(_bytes(t) for _, t in tensors) - masters,
            "masters": masters,
        }

    def save(self) -> Saved:
        """Return the stage's entry for a checkpoint, without copying tensors."""
        state: Saved = {
            "stash": self.stash.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "buffers": {n: b.detach() for n, b in self.module.named_buffers()},
        }
        return state | {name: part.state_dict() for name, part in self._others().items()}

    def _others(self) -> dict[str, Forecast | Norms]:
        """Return the parts that only some pipelines have, by their names in a checkpoint."""
        parts = {"forecast": self.forecast, "norms": self.norms}
        return {name: part for name, part in parts.items() if part is not None}

    def check(self, saved: object) -> None:
        """Raise ValueError if ``saved`` is not the entry of a stage like this one. Its optimizer is not checked."""
        parts = {"stash", "optimizer", "buffers", *self._others()}
        if not isinstance(saved, dict) or not parts <= saved.keys():
            raise ValueError(f"a saved stage must be a dict with {', '.join(sorted(parts))}")
        if (saved["optimizer"] is None) != (self.optimizer is None):
            raise ValueError("only one of the saved stage and this stage has trainable parameters")
        self.stash.check(saved["stash"])
        buffers = dict(self.module.named_buffers())
        if buffers.keys() != saved["buffers"].keys():
            unlike = sorted(buffers.keys() ^ saved["buffers"].keys())
            raise ValueError(f"the saved stage and this stage have different buffers: {', '.join(unlike[:3])}")
        for name, buffer in buffers.items():
            if buffer.shape != saved["buffers"][name].shape:
                there = tuple(saved["buffers"][name].shape)
                raise ValueError(f"the buffer {name} was saved with shape {there}, but has {tuple(buffer.shape)} here")

    @torch.no_grad()
    def load_weights(self, saved: Saved) -> None:
        """Load everything but the optimizer from an entry that ``check`` has accepted."""
        self.stash.load_state_dict(saved["stash"], exactly=saved.get("kept"))
        for name, buffer in self.module.named_buffers():
            buffer.copy_(saved["buffers"][name])
        for name, part in self._others().items():
            part.load_state_dict(saved[name])


def memory_of(stages: Iterable[StageState]) -> dict[str, int]:
    """Return ``StageState.memory`` summed over several stages."""
    parts = [stage.memory() for stage in stages]
    return {name: sum(part[name] for part in parts) for name in ("weights", "stash", "moments", "masters")}


def check_finished(waiting: int, microbatches_per_update: int) -> None:
    """Raise ValueError if ``waiting`` microbatches of an unfinished update have been taken."""
    if waiting:
        raise ValueError(
            f"{waiting} microbatch(es) of an unfinished update are waiting; "
            f"save after a multiple of {microbatches_per_update} microbatches"
        )


def save_stages(terms: Terms, microbatches: int, updates: int, stages: Mapping[int, Saved]) -> Saved:
    """Return a checkpoint of the stages (numbered from 0) that a process has."""
    return {"terms": asdict(terms), "microbatches": microbatches, "updates": updates, "stages": dict(stages)}


def joined(saved: Iterable[Saved]) -> Saved:
    """Return the checkpoints that the processes of one pipeline wrote as the checkpoint of all stages."""
    parts = list(saved)
    return {**parts[0], "stages": {i: stage for part in parts for i, stage in part["stages"].items()}}


def load_stages(terms: Terms, stages: Mapping[int, StageState], saved: object) -> Saved:
    """Load a checkpoint into all stages, or into none if one does not fit. Returns it in the current format.

    Raises:
        ValueError: ``saved`` is not a checkpoint of a pipeline, or it has other terms, stages or parameters.
    """
    whole = as_saved_now(saved)
    terms.check(whole["terms"])
    missing = [i for i in stages if i not in whole["stages"]]
    if missing:
        there = ", ".join(map(str, sorted(whole["stages"]))) or "none"
        raise ValueError(f"the saved pipeline has no stage {missing[0]}; it has {there}")
    for i, stage in stages.items():
        stage.check(whole["stages"][i])
    _load_optimizers({i: stage.optimizer for i, stage in stages.items()}, whole["stages"])
    for i, stage in stages.items():
        stage.load_weights(whole["stages"][i])
    return whole


def _load_optimizers(optimizers: Mapping[int, StageOptimizer | None], saved: Mapping[int, Saved]) -> None:
    before: list[tuple[StageOptimizer, Saved]] = []
    try:
        for i, optimizer in optimizers.items():
            if optimizer is not None:
                _check_groups(optimizer, saved[i]["optimizer"])
                before.append((optimizer, optimizer.state_dict()))
                optimizer.load_state_dict(saved[i]["optimizer"])
    except BaseException:
        for optimizer, state in before:
            optimizer.load_state_dict(state)
        raise


def _check_groups(optimizer: StageOptimizer, saved: object) -> None:
    """Refuse groups of other parameters, or of the same ones in another order, whose states would change places."""
    groups = saved.get("param_groups", ()) if isinstance(saved, dict) else ()
    for here, there in zip(optimizer.param_groups, groups, strict=False):
        names, others = here.get("param_names"), there.get("param_names")
        if names and others and names != others:
            one, other = next((a, b) for a, b in zip_longest(names, others, fillvalue="no parameter") if a != b)
            raise ValueError(
                f"the saved groups have {other} where this pipeline's have {one}; give the same param_groups"
            )


def as_saved_now(saved: object) -> Saved:
    """Return a checkpoint in the format described at the top of this module.

    The two earlier formats, for all stages and for a single one, are converted.

    Raises:
        ValueError: ``saved`` has none of these formats.
    """
    if isinstance(saved, dict) and {"terms", "microbatches", "updates", "stages"} <= saved.keys():
        return saved
    if isinstance(saved, dict) and "microbatches" in saved and ("stashes" in saved or "stash" in saved):
        return _of_all_stages(saved) if "stashes" in saved else _of_one_stage(saved)
    raise ValueError("load_state_dict takes what a pipeline's state_dict() returned")


def _of_all_stages(saved: Saved) -> Saved:
    columns = zip(saved["stashes"], saved["optimizers"], saved["buffers"], strict=True)
    stages = {i: {"stash": _ring(s), "optimizer": o, "buffers": b} for i, (s, o, b) in enumerate(columns)}
    for i, forecast in enumerate(saved["forecasts"]):
        stages[i]["forecast"] = forecast
    return {"terms": _terms_in(saved), "stages": stages, **{n: saved[n] for n in ("microbatches", "updates")}}


def _of_one_stage(saved: Saved) -> Saved:
    stage = {"stash": _ring(saved["stash"]), **{name: saved[name] for name in ("optimizer", "buffers", "kept")}}
    updates = saved["microbatches"] // saved["microbatches_per_update"]
    where = {"microbatches": saved["microbatches"], "updates": updates}
    return {"terms": _terms_in(saved), "stages": {saved["stage"]: stage}, **where}


def _ring(saved: Saved) -> Saved:
    return {"shadow" if name == "beside" else name: value for name, value in saved.items()}


def _terms_in(saved: Saved) -> Saved:
    return {name: saved[name] for name in Terms.__dataclass_fields__ if name in saved}


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()
