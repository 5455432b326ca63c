"""Ready-made parameter groups for the stages of a pipeline."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, overload

from torch import Tensor, nn

from nesterov_pp.pipeline.stage import ParamGroups

_NORM = re.compile(r"norm(\dd)?$", re.IGNORECASE)
_EMBEDDING = re.compile(r"embeddings?(bag)?$", re.IGNORECASE)


@overload
def no_decay(
    stage: nn.Module, *, within: ParamGroups | None = None, embeddings: bool = True
) -> list[dict[str, Any]]: ...


@overload
def no_decay(stage: None = None, *, within: ParamGroups | None = None, embeddings: bool = True) -> ParamGroups: ...


def no_decay(
    stage: nn.Module | None = None, *, within: ParamGroups | None = None, embeddings: bool = True
) -> list[dict[str, Any]] | ParamGroups:
    """Return groups in which norms, biases and embeddings have weight decay 0.

    Pass it as it is, ``param_groups=no_decay``, or with arguments, ``param_groups=no_decay(within=groups)``.

    These parameters have no decay: all with fewer than two dimensions; those named as a bias; those of norms and of
    embeddings, which are recognised by their class or by a class name that ends in "Norm" ("RMSNorm", "LayerNorm2d") or
    "Embedding". A parameter that is tied to one of them is one of them.

    Args:
        stage: the module of a stage; None for the function that takes it.
        within: groups to divide, whose options each part keeps, such as an ``"lr_scale"`` (default: one group of all
            trainable parameters).
        embeddings: whether embeddings are among them (default: True).

    Returns:
        two groups for each of ``within``, without and with the weight decay 0, each in the order of the group that it
        is a part of; frozen parameters are left out.
    """
    if stage is None:
        return partial(no_decay, within=within, embeddings=embeddings)
    exempt = {id(p) for p in _exempt(stage, embeddings)}
    groups = [{"params": list(stage.parameters())}] if within is None else within(stage)
    parts = []
    for group in groups:
        trained = [p for p in group["params"] if p.requires_grad]
        parts.append({**group, "params": [p for p in trained if id(p) not in exempt]})
        parts.append({**group, "params": [p for p in trained if id(p) in exempt], "weight_decay": 0.0})
    return parts


def _exempt(stage: nn.Module, embeddings: bool) -> Iterator[Tensor]:
    for module in stage.modules():
        kind = type(module).__name__
        whole = bool(_NORM.search(kind)) or (embeddings and bool(_EMBEDDING.search(kind)))
        for name, p in module.named_parameters(recurse=False):
            if whole or p.dim() < 2 or name.startswith("bias") or name.endswith("bias"):
                yield p
