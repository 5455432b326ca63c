"""Cutting a model into the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from nesterov_pp.pipeline.cutting.chain import Side, chain_plan, lists_of
from nesterov_pp.pipeline.cutting.decoders import decoder_plan, language_model, note_untied
from nesterov_pp.pipeline.cutting.plan import Part, Plan, homes_of, parts_of, tied_across
from nesterov_pp.pipeline.cutting.plan import untie as untie_entries
from nesterov_pp.pipeline.cutting.stage_module import StageModule, entries, shell_of
from nesterov_pp.pipeline.cutting.weights import load_weights

__all__ = ["StageModule", "cut", "load_weights"]


def cut(
    model: nn.Module,
    stages: int | Sequence[int],
    *,
    layers: str | Sequence[str] | None = None,
    before: Side | None = None,
    after: Side | None = None,
    each: Callable[..., Any] | None = None,
    untie: bool = False,
) -> list[StageModule]:
    """Return the stages of a model, for ``VirtualPipeline`` and ``AsyncPipeline``.

    Everything in the model's ``state_dict()`` is on exactly one stage, under the model's own name; so the union of the
    stages' state dicts is the model's. The stages hold the model's own parameters, not copies.

    A causal language model of transformers (GPT-2, Llama, Mistral, Mixtral, Qwen, Gemma and others), with or without
    peft's adapters, needs no other arguments. Its first stage takes ``input_ids``, or a dict of ``input_ids``,
    ``attention_mask`` and ``position_ids``; its last stage returns the logits. An ``nn.Sequential`` needs none either.
    Of any other model, ``layers``, ``before`` and ``after`` say what to call.

    Args:
        model: the model; may be on the meta device, and each process then loads its own stage with ``load_weights``.
        stages: the number of stages, to minimize the parameters of the largest one; or the number of layers of each
            stage. The first stage also holds what comes before the layers, the last one what comes after them.
        layers: the name of the ``nn.ModuleList`` or ``nn.Sequential`` of layers; or several such names, or names of
            single layers, in the order in which they are applied.
        before: what comes before the layers: ``(model, *inputs) -> hidden``, or the names of modules that are applied
            in turn (default: nothing). It may return a tuple ``(hidden, *context)``; each layer is given all of it, and
            may return a new hidden state alone, or a tuple.
        after: what comes after the layers: ``(model, hidden, *context) -> output``, or the names of modules that are
            applied to the hidden state in turn (default: nothing).
        each: ``(model, layer, hidden, *context) -> hidden``, if layers are not simply called. On a stage, ``model``
            has the layers of this stage only; modules without state and buffers that are not persistent are on all.
        untie: give a parameter that two stages would share its own copy on the later one. The model itself is changed.

    With functions for both ``before`` and ``after``, the first stage holds what the model defines before its layers,
    and the last stage what it defines after them.

    Raises:
        ValueError: the model cannot be cut in this way; nothing is changed.
    """
    plan = _plan(model, layers, before, after, each)
    named = entries(model)
    parts = parts_of(plan, named, stages)
    homes = homes_of(plan, named, parts)
    tied = tied_across(named, homes)
    if tied and not untie:
        name, source = next(iter(tied.items()))
        raise ValueError(
            f"{name} is tied to {source}, but they are on stages {homes[name]} and {homes[source]}, which update at "
            "different times; pass untie=True to give it its own copy, or cut the model into one stage"
        )
    made = _stage_modules(model, plan, parts, homes, tied)  # may raise, so this comes before any change to the model
    if not tied:
        return made
    untie_entries(model, tied)
    inner = language_model(model)
    if inner is not None:
        note_untied(inner[1], set(tied))
    return _stage_modules(model, plan, parts, homes, tied)


def _stage_modules(
    model: nn.Module, plan: Plan, parts: Sequence[Part], homes: Mapping[str, int], tied: Mapping[str, str]
) -> list[StageModule]:
    made = []
    for k, part in enumerate(parts):
        run, stand_ins = plan.stage(part)
        own = {name for name, home in homes.items() if home == k}
        copied_from = {name: source for name, source in tied.items() if name in own}
        made.append(StageModule(shell_of(model, own, stand_ins), run, copied_from))
    return made


def _plan(
    model: nn.Module,
    layers: str | Sequence[str] | None,
    before: Side | None,
    after: Side | None,
    each: Callable[..., Any] | None,
) -> Plan:
    if layers is not None:
        return chain_plan(model, layers, before, after, each)
    if (before, after, each) != (None, None, None):
        raise ValueError("before, after and each need layers=, the name of the model's list of layers")
    found = language_model(model)
    if found is not None:
        return decoder_plan(model, *found)
    if isinstance(model, nn.Sequential):
        return chain_plan(model, "", None, None, None)
    lists = lists_of(model)
    raise ValueError(
        f"say with layers= where the layers of {type(model).__name__} are, and with before= and after= what surrounds "
        f"them; its lists of modules are {', '.join(map(repr, lists)) or 'none'}"
    )
