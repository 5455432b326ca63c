"""This library's optimizers in torchtitan's trainer; ``README.md`` beside this file says how to choose them.

A torchtitan config asks for optimizers by name. ``Rules`` adds two names to those that torchtitan has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config.override import derive, override

import nesterov_pp as npp

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer

RULES: dict[str, type[Optimizer]] = {"NAdam": npp.NAdam, "RotatedNAdam": npp.RotatedNAdam}
LOW_PRECISION = "fused_opt_states_bf16"


class Rules(OptimizersContainer):  # type: ignore[misc]
    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        pass

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        return RULES.get(name) or OptimizersContainer._resolve_optimizer_factory(name)


@override(target=OptimizersContainer.Config, description="NAdam with decoupled weight decay")  # type: ignore[untyped-decorator]
def nadam(config: OptimizersContainer.Config, **options: Any) -> Any:
    """Return ``config`` with NAdam for Adam and AdamW; ``options`` replace those of the config's groups."""
    changed = _stepped_by("NAdam", config, {"decoupled_weight_decay": True, **options})
    if config.implementation == LOW_PRECISION:
        changed.optimizer_factory_kwargs_by_name["NAdam"] = {"state_dtype": torch.bfloat16}
    return changed


@override(target=OptimizersContainer.Config, description="NAdam in the eigenbasis of each matrix")  # type: ignore[untyped-decorator]
def rotated(config: OptimizersContainer.Config, **options: Any) -> Any:
    """Return ``config`` with RotatedNAdam for Adam and AdamW; it steps whole matrices, no shards: see ``unsharded``."""
    if config.implementation == LOW_PRECISION:
        raise ValueError(f"RotatedNAdam keeps its state in float32; choose another implementation than {LOW_PRECISION}")
    return _stepped_by("RotatedNAdam", config, options)


def unsharded(model: nn.Module, **_: Any) -> nn.Module:
    """Leave the model as it is: a ``parallelize_fn``. Torchtitan's own ones make DTensors even of a single shard."""
    return model


def llama3_rotated() -> Trainer.Config:
    """Return a config for ``--module rules --config llama3_rotated``."""
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    config = llama3_debugmodel()
    config.optimizer = rotated(config.optimizer)
    config.model_spec.parallelize_fn = unsharded
    return config


def _stepped_by(rule: str, config: OptimizersContainer.Config, options: dict[str, Any]) -> Any:
    groups = [
        replace(group, optimizer_name=rule, optimizer_kwargs={**group.optimizer_kwargs, **options})
        if group.optimizer_name in ("Adam", "AdamW")
        else group
        for group in config.param_groups
    ]
    factory = dict(config.optimizer_factory_kwargs_by_name)
    return derive(config, Rules.Config, param_groups=groups, optimizer_factory_kwargs_by_name=factory)
