"""``export`` of every pipeline: the trained weights as one ordinary state dict of the uncut model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nesterov_pp.pipeline.checkpoints import replacing, serialise
from nesterov_pp.pipeline.cutting.stage_module import StageModule

Naming = Callable[[int, str], str]
"""``(stage from 0, name in the stage) -> name in the whole model``."""


@dataclass(frozen=True)
class Tied:
    """An entry that is the same tensor as an earlier entry of its stage."""

    name: str


Entry = tuple[str, Any]
"""A name in the whole model, and a tensor, ``Tied``, or whatever else a module has in its state."""


class _Pipeline(Protocol):
    def _entries(self, names: Naming | None) -> Iterator[Entry] | None: ...


class Exports:
    """The method ``export`` of a pipeline."""

    def export(
        self: _Pipeline, path: str | Path | None = None, *, names: Naming | None = None
    ) -> dict[str, Any] | None:
        """Return the trained weights and the buffers of all stages as the state dict of the uncut model.

        These are the weights with which ``predict`` and ``evaluate`` run, also where forwards run at predicted weights.
        All processes call it after the same microbatches; process 0 receives the other stages' tensors one by one.

        Args:
            path: also write them to this file, whose folder is created if it is absent: ``.pt`` for ``torch.load``, or
                ``.safetensors`` (needs the package).
            names: ``(stage from 0, name in the stage) -> name`` (default: the names of the model or ``nn.Sequential``
                that was cut, and for a list of other stages those of ``nn.Sequential(*stages)``).

        Returns:
            New tensors on the CPU by name; entries that were the same tensor still are. In an ``AsyncPipeline``, None
            on the processes other than 0.

        Raises:
            ValueError: two entries get the same name, or ``path`` cannot be written in that format.
            OSError: the file cannot be written, in one sentence.
        """
        if path is not None:
            check_format(Path(path))
        entries = self._entries(names)
        if entries is None:
            return None
        state: dict[str, Any] = {}
        for name, value in entries:
            if name in state:
                raise ValueError(f"two entries of the stages are named {name!r}; give each its own with names=")
            state[name] = state[value.name] if isinstance(value, Tied) else value
        if path is not None:
            write_weights(Path(path), state)
        return state


def naming_of(model: nn.Module | Sequence[nn.Module], stage: nn.Module, index: int) -> Callable[[str], str]:
    """Return the function from names in a stage to names in the whole model.

    Args:
        model: what the pipeline was given: an ``nn.Sequential`` to cut or of stages, a list of stages, or the stage.
        stage: the module of the stage.
        index: the number of the stage, from 0.
    """
    if isinstance(stage, StageModule):
        return lambda name: name  # as in the model that was cut
    if not isinstance(model, nn.Sequential) or model is stage:
        return lambda name: f"{index}.{name}"
    layers = list(model._modules.items())
    for name, layer in layers:
        if layer is stage:
            return lambda own: f"{name}.{own}"
    own = list(stage._modules.values())
    starts = range(len(layers) - len(own) + 1)
    first = next(i for i in starts if all(layer is b for (_, layer), b in zip(layers[i:], own, strict=False)))
    renamed = {name: layers[first + k][0] for k, name in enumerate(stage._modules)}

    def rename(name: str) -> str:
        head, _, rest = name.partition(".")
        return f"{renamed[head]}.{rest}"

    return rename


def entries_of(stage: nn.Module, rename: Callable[[str], str]) -> Iterator[Entry]:
    """Yield the state of a stage under other names, copying one tensor at a time to the CPU."""
    first_with: dict[Any, str] = {}
    for own, value in stage.state_dict().items():
        name = rename(own.replace("_orig_mod.", ""))  # torch.compile adds this part
        if not isinstance(value, Tensor):
            yield name, value
            continue
        here = value.to_local() if hasattr(value, "to_local") else value  # the shard of a DTensor
        key = (here.data_ptr(), here.shape, here.stride(), here.dtype)
        first = first_with.setdefault(key, name) if here.numel() else name
        if first != name:
            yield name, Tied(first)
            continue
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        yield name, torch.empty_like(whole, device="cpu", memory_format=torch.contiguous_format).copy_(whole)


def check_format(path: Path) -> None:
    """Raise ValueError if weights cannot be written to a file of this name."""
    if path.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"{path} ends neither in .pt nor in .safetensors; give the file one of these endings")
    if path.suffix == ".safetensors" and importlib.util.find_spec("safetensors") is None:
        raise ValueError("writing .safetensors needs the package safetensors; install it, or give a name ending in .pt")


def write_weights(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state dict to a ``.pt`` or ``.safetensors`` file, which appears complete or not at all.

    Raises:
        ValueError: as for ``check_format``; or a ``.safetensors`` file would have to hold something else than tensors.
        OSError: the file cannot be written, in one sentence.
    """
    check_format(path)
    if path.suffix == ".pt":
        with replacing(path) as temporary:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                serialise(dict(state), file)
        return
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    other = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        raise ValueError(f"{other} is not a tensor, so it cannot be in a .safetensors file; write a .pt file")
    seen: set[int] = set()
    apart = {}
    for name, value in state.items():  # the format has no tied tensors
        apart[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    with replacing(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(apart, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from None


def read_weights(path: Path) -> dict[str, Any]:
    """Return the state dict in a file that ``write_weights`` wrote. No code in the file is executed.

    Raises:
        ValueError: the file is absent, or is not such a file.
    """
    check_format(path)
    state: object = None
    try:
        if path.suffix == ".pt":
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            from safetensors.torch import load_file

            state = load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception:
        state = None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} is damaged, or holds no exported weights")
    return state
