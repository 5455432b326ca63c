"""What a checkpoint of a pipeline holds, the same in one process and in several.

A saved pipeline is ``{"terms": {...}, "microbatches": int, "updates": int, "stages": {i: stage}}`` with the stages
(from 0) that the process has, so the stages of several files put together are those of a whole pipeline. A stage is
``{"stash", "optimizer", "buffers"}``, with ``"forecast"`` where the method guesses gradients, and with ``"kept"``,
older versions, where microbatches in flight began with weights that no ring holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nesterov_pp.pipeline.recipe import Forecast, StageOptimizer
from nesterov_pp.stash import WeightStash

Saved = dict[str, Any]


@dataclass(frozen=True)
class Terms:
    """What a saved pipeline and the one that goes on with it must have in common."""

    method: str
    microbatches_per_update: int
    delays: list[int]
    flush_every: int | None
    seed: int | None
    replicas: int = 1

    def check(self, saved: Mapping[str, Any]) -> None:
        """Raises: ValueError: ``saved`` has another value; one that it does not have is not compared."""
        for name, value in asdict(self).items():
            if saved.get(name, value) != value:
                raise ValueError(f"the saved pipeline has {name} {saved[name]!r}, this one {value!r}")


@dataclass(frozen=True)
class StageState:
    """One stage: its ring, its optimizer (None without trainable parameters), its module and its forecast."""

    stash: WeightStash
    optimizer: StageOptimizer | None
    module: nn.Module
    forecast: Forecast | None = None

    def memory(self) -> dict[str, int]:
        """Bytes held: ``weights`` (one version), ``stash`` (the others), ``moments`` (means of gradients included)."""
        one = sum(map(_bytes, self.stash.parameters(self.stash.newest).values()))
        frozen = sum(_bytes(p) for p in self.module.parameters() if not p.requires_grad)
        states = () if self.optimizer is None else self.optimizer.state.values()
        moments = sum(_bytes(t) for state in states for name, t in state.items() if name.startswith("exp_avg"))
        others = self.stash.versions - 1 + (self.stash.shadow is not None)
        return {"weights": one + frozen, "stash": others * one, "moments": moments}

    def save(self) -> Saved:
        """The stage's entry of a checkpoint, without copies."""
        state: Saved = {
            "stash": self.stash.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "buffers": {n: b.detach() for n, b in self.module.named_buffers()},
        }
        return state if self.forecast is None else {**state, "forecast": self.forecast.state_dict()}

    def check(self, saved: object) -> None:
        """Raises: ValueError: ``saved`` is not the entry of a stage like this one; its optimizer is not looked at."""
        parts = {"stash", "optimizer", "buffers"} | (set() if self.forecast is None else {"forecast"})
        if not isinstance(saved, dict) or not parts <= saved.keys():
            raise ValueError(f"a saved stage must be a dict with {', '.join(sorted(parts))}")
        if (saved["optimizer"] is None) != (self.optimizer is None):
            raise ValueError("one of the saved stage and this one has trainable parameters, and the other has none")
        self.stash.check(saved["stash"])
        buffers = dict(self.module.named_buffers())
        if buffers.keys() != saved["buffers"].keys():
            unlike = sorted(buffers.keys() ^ saved["buffers"].keys())
            raise ValueError(f"the saved stage has other buffers: {', '.join(unlike[:3])} differ")
        for name, buffer in buffers.items():
            if buffer.shape != saved["buffers"][name].shape:
                there = tuple(saved["buffers"][name].shape)
                raise ValueError(f"the buffer {name} was saved with shape {there}, but has {tuple(buffer.shape)} here")

    @torch.no_grad()
    def load_weights(self, saved: Saved) -> None:
        """Take over all of a checked entry but the optimizer."""
        self.stash.load_state_dict(saved["stash"])
        for name, buffer in self.module.named_buffers():
            buffer.copy_(saved["buffers"][name])
        if self.forecast is not None:
            self.forecast.load_state_dict(saved["forecast"])


def memory_of(stages: Iterable[StageState]) -> dict[str, int]:
    """``StageState.memory`` over several stages."""
    parts = [stage.memory() for stage in stages]
    return {name: sum(part[name] for part in parts) for name in ("weights", "stash", "moments")}


def check_finished(waiting: int, microbatches_per_update: int) -> None:
    """Raises: ValueError: so many microbatches of an update have been taken, and not all."""
    if waiting:
        raise ValueError(
            f"{waiting} microbatch(es) of an update are waiting; "
            f"save after a multiple of {microbatches_per_update} microbatches"
        )


def save_stages(terms: Terms, microbatches: int, updates: int, stages: Mapping[int, Saved]) -> Saved:
    """A checkpoint of the stages (from 0) that a process has."""
    return {"terms": asdict(terms), "microbatches": microbatches, "updates": updates, "stages": dict(stages)}


def load_stages(terms: Terms, stages: Mapping[int, StageState], saved: object) -> Saved:
    """Go on with a checkpoint, all stages or, where one does not fit, none; returns it in today's form.

    Raises:
        ValueError: ``saved`` is no checkpoint of a pipeline, or one of other terms, stages or parameters.
    """
    whole = as_saved_now(saved)
    terms.check(whole["terms"])
    missing = [i + 1 for i in stages if i not in whole["stages"]]
    if missing:
        there = ", ".join(str(i + 1) for i in sorted(whole["stages"])) or "none"
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
                before.append((optimizer, optimizer.state_dict()))
                optimizer.load_state_dict(saved[i]["optimizer"])
    except BaseException:
        for optimizer, state in before:
            optimizer.load_state_dict(state)
        raise


def as_saved_now(saved: object) -> Saved:
    """A checkpoint in the form at the top of this page; also reads the two earlier ones, of all stages and of one.

    Raises:
        ValueError: it is something else.
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
