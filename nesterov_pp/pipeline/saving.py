"""``save`` and ``resume`` of every pipeline: its checkpoints in a folder."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from nesterov_pp.pipeline import checkpoints
from nesterov_pp.pipeline.batches import Batches
from nesterov_pp.pipeline.stage_state import as_saved_now, joined

Saved = dict[str, Any]


class Stateful(Protocol):
    """Anything whose state is saved and restored beside a pipeline's: a scheduler, a loader, an average of weights."""

    def state_dict(self) -> Any:
        """Return the state: tensors, numbers, strings, and containers of them."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Restore a state that ``state_dict`` returned."""


@dataclass
class Files:
    """Where one process of a pipeline keeps its checkpoints, and what it has done there.

    Attributes:
        part: marks this process's files; "" where one process has all stages.
        writes: whether this process writes files; of several replicas, one does.
        replicas: the number of replicas of the pipeline.
        behind: how many microbatches the slowest process may be behind this one.
        gather: returns the value of every process.
        sharded: whether the stage is spread over its replicas, so that no process has all of it.
        own: the folders that this pipeline has resumed from or written to.
        saved: the number of microbatches at the last checkpoint that was written or read.
        checked: the names of the further states that are known to be readable again.
    """

    part: str = ""
    writes: bool = True
    replicas: int = 1
    behind: int = 0
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    sharded: bool = False
    own: set[Path] = field(default_factory=set)
    saved: int | None = None
    checked: set[str] = field(default_factory=set)

    def claim(self, folder: Path) -> None:
        """Check that this pipeline may write to the folder, because it has resumed from it or it holds no checkpoints.

        Raises:
            ValueError: it holds checkpoints.
        """
        if folder.resolve() in self.own:
            return
        others = {processes for processes in checkpoints.parts_in(folder) if processes != self._processes()}
        if others or checkpoints.checkpoints(folder, self.part):
            raise ValueError(
                f"{folder} holds checkpoints that this pipeline has not resumed from; call resume({str(folder)!r}) "
                "before the first step, or save to another folder"
            )
        self.own.add(folder.resolve())

    def newest(self, folder: Path) -> list[Path]:
        """Return this process's file of the newest checkpoint that all processes have; nothing if there is none.

        A process that has all stages also takes the files of a pipeline in several processes.

        Raises:
            ValueError: the folder holds only checkpoints of another number of processes.
        """
        found = checkpoints.newest(folder, self.part, self.gather)
        if found is not None:
            return [found]
        files = [] if self.part else checkpoints.newest_complete(folder)
        others = sorted(set(checkpoints.parts_in(folder)) - {self._processes()})
        if others and not files:
            raise ValueError(
                f"{folder} holds checkpoints of a pipeline in {others[0]} process(es), not {self._processes()}; "
                "resume with that many"
            )
        return files

    def _processes(self) -> int:
        return int(self.part.rsplit("-", 1)[-1]) if self.part else 1


class _Pipeline(Protocol):
    """What ``Checkpoints`` needs of a pipeline."""

    _files: Files

    @property
    def microbatches(self) -> int: ...

    @property
    def updates(self) -> int: ...

    def state_dict(self) -> Saved: ...

    def load_state_dict(self, state: Saved) -> None: ...

    def keep_for(self, update: int) -> None: ...

    def _is_due(self, every: int) -> bool: ...

    def _own_data(self) -> Batches | None: ...


class Checkpoints:
    """The methods ``save`` and ``resume`` of a pipeline."""

    def save(
        self: _Pipeline,
        folder: str | Path,
        *,
        every: int | None = None,
        keep: int = checkpoints.KEPT,
        also: Mapping[str, Stateful] | None = None,
    ) -> Path | None:
        """Write a checkpoint to ``folder``: the pipeline, the position in its data, and the global random states.

        All processes call it after the same microbatches, and none waits for another. A checkpoint appears complete or
        not at all, and an old one goes only when all processes have ``keep`` newer ones, so a process may be killed at
        any moment.

        Args:
            folder: is created if it is absent. All processes must see the same one.
            every: if given, ``save`` is to be called after every step. It then writes after every ``every`` updates,
                and at the end of an ``AsyncPipeline``'s run, and does nothing in between. This is how a pipeline
                without a stash learns when to keep the weights that a checkpoint needs. (It does not write after its
                first updates, as many as its delay, unless ``resume`` was called before.)
            keep: the number of checkpoints to keep (default: 2).
            also: further objects whose ``state_dict()`` is saved, by name: ``{"scheduler": scheduler}``.

        Returns:
            The file that was written; None if there was nothing to do for this process.

        Raises:
            ValueError: the folder holds checkpoints that this pipeline has not resumed from; an update is unfinished;
                weights that microbatches in flight began with were not kept; ``every`` or ``keep`` is below 1; a state
                in ``also`` has more in it than tensors, numbers, strings and their containers; or the stage is spread
                over its replicas.
            OSError: the file cannot be written, in one sentence; older checkpoints are kept.
        """
        folder, files = Path(folder), self._files
        for name, count in (("every", every), ("keep", keep)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, not {count}")
        if files.sharded:
            raise ValueError(
                "save writes whole stages, but fully_shard has spread this one over its replicas; "
                "save state_dict() with torch.distributed.checkpoint instead"
            )
        if every is not None:
            self.keep_for((self.updates // every + 1) * every)
            if files.saved == self.microbatches or not self._is_due(every):
                return None
        data = self._own_data()
        further = {name: part.state_dict() for name, part in (also or {}).items()}
        state = {
            "pipeline": self.state_dict(),
            "random": random_states(),
            "data": None if data is None else data.state_at(self.microbatches * files.replicas),
            "also": further,
        }
        for name, part in {**further, "data": state["data"]}.items():
            if name not in files.checked:
                check_readable(name, part)
                files.checked.add(name)
        files.claim(folder)
        path = None
        if files.writes:
            folder.mkdir(parents=True, exist_ok=True)
            certain = self.microbatches - files.behind
            path = checkpoints.write(folder, self.microbatches, state, part=files.part, certain=certain, keep=keep)
        files.saved = self.microbatches
        return path

    def resume(self: _Pipeline, folder: str | Path, *, also: Mapping[str, Stateful] | None = None) -> Path | None:
        """Continue from the newest checkpoint in ``folder`` that all processes have; without one, change nothing.

        All processes must call it before the first step (in a ``VirtualPipeline``, at any time between updates). The
        losses that follow are those that the run would have had without the interruption. A ``VirtualPipeline`` also
        resumes from the checkpoint of an ``AsyncPipeline`` with a stash, and then saves to another folder.

        Args:
            folder: may be absent or empty.
            also: as given to ``save``.

        Returns:
            This process's file, or None if the run begins; ``microbatches`` and ``updates`` are the position.

        Raises:
            ValueError: the checkpoint is damaged or belongs to another pipeline, or ``also`` has other names than it.
        """
        folder, files = Path(folder), self._files
        found: list[Path] = []
        problem = None
        try:
            found = files.newest(folder)
            if found:
                _load(self, found, also or {})
        except ValueError as error:
            problem = str(error)
        problems = [problem, *(p for p in files.gather(problem) if p is not None)]
        if any(problems):
            raise ValueError(next(p for p in problems if p is not None))
        if files.writes and folder.is_dir():
            checkpoints.clear_leftovers(folder, files.part)
        if len(found) <= 1:
            files.own.add(folder.resolve())
        files.saved = self.microbatches if found else None
        self.keep_for(self.updates + 1)
        return found[0] if found else None


def _load(pipe: _Pipeline, files: list[Path], also: Mapping[str, Stateful]) -> None:
    """Load the checkpoint in the files of one pipeline, with the states of the first one's process beside it."""
    path, states = files[0], [checkpoints.read(file) for file in files]
    state = states[0]
    saved = state.get("also", {})
    for name in sorted(saved.keys() ^ also.keys()):
        what = "a state of" if name in saved else "no state of"
        raise ValueError(f"{path} has {what} {name!r}; give resume the same also= as save")
    try:
        pipe.load_state_dict(joined(as_saved_now(part["pipeline"]) for part in states))
    except ValueError as error:
        raise ValueError(f"{path} belongs to another pipeline: {error}") from None
    for name, part in also.items():
        part.load_state_dict(saved[name])
    data = pipe._own_data()
    if data is not None and state.get("data") is not None:
        data.load_state_dict(state["data"])
    if pipe._files.writes and "random" in state:
        restore_random_states(state["random"])


def random_states() -> Saved:
    """Return the states of the global random number generators: torch's, Python's and NumPy's."""
    name, keys, *rest = np.random.get_state()
    gpus = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if gpus else [],
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def restore_random_states(saved: Saved) -> None:
    """Restore what ``random_states`` returned; GPUs that are no longer there are left out."""
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and torch.cuda.is_available():
        for device, state in enumerate(saved["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
    version, keys, gauss = saved["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def check_readable(name: str, state: Any) -> None:
    """Raise ValueError if a state could be saved, but not be read again without running code from the file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"the state of {name!r} has more in it than tensors, numbers, strings and their containers, so it "
            "could not be read again safely; leave the rest out of its state_dict()"
        ) from None
