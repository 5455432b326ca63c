"""Cutting the decoder-only language models of Hugging Face transformers.

[note: every stage runs the model's own forward]
The base model (``LlamaModel``, ...) takes ``inputs_embeds`` in place of token ids. A later stage passes its hidden
state there, and modules that return their input stand in for the layers of other stages and for the final norm. So
causal masks, sliding windows and rotary embeddings are those that the model itself makes, from the hidden state, the
attention mask and the position ids; only these are handed on.

A family belongs in ``LAYOUTS`` only if its forward computes nothing else between the embedding and the layers: scaling
the embedded tokens there (as Granite does) would scale every stage's input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from nesterov_pp.pipeline.cutting.plan import Part, Plan, below
from nesterov_pp.pipeline.cutting.stage_module import Nothing, PassOn, entries


class Layout(NamedTuple):
    """Names of modules of a base model; ``positions`` and ``dropout`` are applied to embedded tokens."""

    tokens: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    positions: str | None = None
    dropout: str | None = None


LAYOUTS = {
    "gpt2": Layout("wte", "h", "ln_f", positions="wpe", dropout="drop"),
    "gpt_neox": Layout("embed_in", "layers", "final_layer_norm", dropout="emb_dropout"),
    **dict.fromkeys(
        (
            *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
            *("gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "phi3", "smollm3"),
        ),
        Layout(),
    ),
}
"""The layout of each family, by the ``model_type`` of its configuration."""


@dataclass(frozen=True)
class Decoder:
    """What a stage of a decoder computes.

    The first stage takes ``input_ids`` (or ``inputs_embeds``), ``attention_mask`` and ``position_ids``, by position or
    by name; the others ``hidden_states`` instead of ids. A stage returns the hidden state, as a dict with the mask and
    the position ids if there are any; the last one returns the logits.
    """

    model: str
    base: str
    first: bool
    last: bool

    def __call__(self, shell: nn.Module, *inputs: Any, **named: Any) -> Any:
        ours = ("input_ids",) if self.first else ("hidden_states",)
        known = (*ours, "attention_mask", "position_ids")
        given = {**dict(zip(known, inputs, strict=False)), **named}
        extra = [name for name in named if name not in (*known, *(["inputs_embeds"] if self.first else []))]
        if extra or len(inputs) > len(known):
            raise ValueError(
                f"a stage takes {', '.join(known)}, not {', '.join(extra) or f'{len(inputs)} inputs'}; "
                "labels are the targets that loss_fn is given"
            )
        if not self.first:
            given["inputs_embeds"] = given.pop("hidden_states")
        options = {"use_cache": False, "return_dict": True}  # training has no use for keys and values of the past
        if self.last:
            return shell.get_submodule(self.model)(**given, **options).logits
        hidden: Tensor = shell.get_submodule(self.base)(**given, **options).last_hidden_state
        context = {name: given[name] for name in known[1:] if given.get(name) is not None}
        return {"hidden_states": hidden, **context} if context else hidden


def language_model(model: nn.Module) -> tuple[str, Any] | None:
    """Return the name in ``model`` of a model of transformers, and the model: ``model`` itself, or inside peft's."""
    transformers, peft = sys.modules.get("transformers"), sys.modules.get("peft")
    if transformers is None:
        return None
    inner: Any = model
    if peft is not None and isinstance(model, peft.PeftModel):
        inner = model.get_base_model()
    if not isinstance(inner, transformers.PreTrainedModel):
        return None
    return next(name for name, module in model.named_modules() if module is inner), inner


def decoder_plan(model: nn.Module, name: str, inner: Any) -> Plan:
    """Return the plan of a model that holds the language model ``inner`` under ``name``.

    Raises:
        ValueError: this model cannot be cut.
    """
    layout = _checked_layout(inner)
    base_name = _joined(name, inner.base_model_prefix)
    head = next(_joined(name, key) for key, m in inner.named_modules() if m is inner.get_output_embeddings())
    norm = _joined(base_name, layout.norm)
    layers = [
        _joined(base_name, f"{layout.layers}.{i}") for i in range(len(inner.base_model.get_submodule(layout.layers)))
    ]
    named = list(entries(model))
    on_entry = [_joined(base_name, key) for key in (layout.tokens, layout.positions) if key is not None]
    before, after = below(named, on_entry), below(named, [norm, head])
    extra = [entry for entry in named if entry not in before | after | below(named, layers)]
    if extra:
        raise ValueError(
            f"{extra[0]} is no part of the decoder as cut knows it (embeddings, layers, final norm, head), so no stage "
            "would use it"
        )

    def stage(part: Part) -> tuple[Callable[..., Any], Mapping[str, nn.Module]]:
        outside = [*layers[: part.start], *layers[part.stop :]]
        stand_ins: dict[str, nn.Module] = {layer: PassOn() for layer in outside}
        if not part.last:
            stand_ins[norm] = PassOn()
        if not part.first and layout.positions is not None:
            stand_ins[_joined(base_name, layout.positions)] = Nothing()
        if not part.first and layout.dropout is not None:
            stand_ins[_joined(base_name, layout.dropout)] = PassOn()
        return Decoder(name, base_name, part.first, part.last), stand_ins

    return Plan(before, layers, after, stage)


def note_untied(inner: Any, names: set[str]) -> None:
    """Make the configuration of a language model say that its head is no longer tied, for ``save_pretrained``."""
    inner.config.tie_word_embeddings = False
    for module in inner.modules():
        tied: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
        for key in [key for key in tied if any(name.endswith(key) for name in names)]:
            del tied[key]


def _checked_layout(inner: Any) -> Layout:
    config, kind = inner.config, type(inner).__name__
    version = sys.modules["transformers"].__version__
    if int(version.split(".")[0]) < 5:
        raise ValueError(f"cutting a {kind} needs transformers 5 or newer, not {version}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{kind} has an encoder and a decoder, whose layers all need the encoder's output; cut takes models with "
            "one list of layers, so write its stages as modules that hand this output on"
        )
    if config.model_type not in LAYOUTS:
        raise ValueError(
            f"cut does not know the layout of {kind} ({config.model_type!r}); name its list of layers and what comes "
            f"before and after them (layers=, before=, after=), or use one of {', '.join(sorted(LAYOUTS))}"
        )
    if not kind.endswith(("ForCausalLM", "LMHeadModel")) or inner.get_output_embeddings() is None:
        raise ValueError(f"{kind} is no causal language model with a head; cut takes models such as LlamaForCausalLM")
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "the load-balancing loss of output_router_logits needs the routers of all stages at once; "
            "set model.config.output_router_logits = False before cutting the model"
        )
    return LAYOUTS[config.model_type]


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
