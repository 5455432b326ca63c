"""Loading the weights of one stage by name."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nesterov_pp.pipeline.cutting.stage_module import StageModule, entries

Source = Callable[[str], Tensor]


def load_weights(
    stage: StageModule, weights: str | Path | Mapping[str, Tensor], *, device: torch.device | str = "cpu"
) -> None:
    """Give a stage of a model its parameters and buffers, reading no others.

    For a model that was built on the meta device and cut, this replaces ``to_empty``, which would leave buffers that no
    file holds (such as rotary frequencies) without values. Values are converted to the stage's dtypes. A parameter
    that ``cut`` untied gets the value of the one that it was tied to, if it has none of its own.

    Args:
        stage: one of the stages that ``cut`` returned.
        weights: a file of safetensors; a folder of them with or without an index, as ``save_pretrained`` writes it; or
            a mapping from names to tensors.
        device: where the stage will be.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ValueError: a value is missing or has another shape, or a buffer that is not saved cannot be computed. The stage
            is unchanged.
    """
    sources = _sources(weights)
    wanted = entries(stage)
    chosen = {name: name if name in sources else stage.copied_from.get(name, name) for name in wanted}
    # Tied parameters of one stage are saved under one of their names.
    by_tensor = {id(wanted[name]): chosen[name] for name in wanted if chosen[name] in sources}
    missing = [name for name, t in wanted.items() if id(t) not in by_tensor]
    if missing:
        raise ValueError(
            f"the weights have no {missing[0]} ({len(missing)} of {len(wanted)} names are missing); weights saved "
            "under other names have to be loaded into the whole model, before it is cut"
        )
    values: dict[int, Tensor] = {}
    for name, t in wanted.items():
        if id(t) in values:
            continue
        value = sources[by_tensor[id(t)]](by_tensor[id(t)])
        if value.shape != t.shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, but {tuple(value.shape)} in the weights")
        value = value.detach().to(device=device, dtype=t.dtype, copy=isinstance(weights, Mapping))
        values[id(t)] = nn.Parameter(value, t.requires_grad) if isinstance(t, nn.Parameter) else value
    _compute_buffers(stage, torch.device(device))
    for module in stage.modules():
        for held in (module._parameters, module._buffers):
            for key, old in held.items():
                if id(old) in values:
                    held[key] = values[id(old)]  # type: ignore[assignment]


def _sources(weights: str | Path | Mapping[str, Tensor]) -> dict[str, Source]:
    """Return, for every name in the weights, the function that reads it."""
    if isinstance(weights, Mapping):
        return dict.fromkeys(weights, weights.__getitem__)
    path = Path(weights)
    if not path.exists():
        raise FileNotFoundError(f"there are no weights at {path}")
    if path.is_file():
        files = [path]
    else:
        index = path / "model.safetensors.index.json"
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else None
        files = sorted(path.glob("*.safetensors")) if names is None else [path / name for name in names]
    if not files:
        raise FileNotFoundError(f"there are no *.safetensors in {path}")
    if importlib.util.find_spec("safetensors") is None:
        raise ValueError(
            f"reading {files[0]} needs the package safetensors; install it, or give the weights themselves"
        )
    from safetensors import safe_open

    found: dict[str, Source] = {}
    for file in files:
        opened: Any = safe_open(str(file), framework="pt")
        found |= dict.fromkeys(opened.keys(), opened.get_tensor)
    return found


def _compute_buffers(stage: StageModule, device: torch.device) -> None:
    """Give values to the buffers on the meta device that no weights hold, as the model's class initialises them.

    Raises:
        ValueError: the class does not initialise one of them; all stay as they are.
    """
    without = [
        (module, key, buffer, f"{name}.{key}" if name else key)
        for name, module in stage.named_modules()
        for key in module._non_persistent_buffers_set
        if (buffer := module._buffers.get(key)) is not None and buffer.is_meta
    ]
    model: Any = next((m for m in stage.shell.modules() if hasattr(m, "_init_weights")), None)
    for module, key, buffer, _ in without:
        module._buffers[key] = torch.full_like(buffer, _unset(buffer.dtype), device=device)
    if model is not None:
        with torch.no_grad():
            for module in {id(module): module for module, _, _, _ in without}.values():
                model._init_weights(module)
    for module, key, buffer, name in without:
        value = module._buffers[key]
        if value is not None and bool(((value != value) | (value == _unset(buffer.dtype))).any()):
            for other, other_key, before, _ in without:
                other._buffers[other_key] = before
            raise ValueError(
                f"{name} is a buffer without values that is not saved; build the model with real buffers, such as by "
                "accelerate.init_empty_weights()"
            )


def _unset(dtype: torch.dtype) -> float | int:
    """Return a value that no buffer is given."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 0 if dtype == torch.bool else torch.iinfo(dtype).min
