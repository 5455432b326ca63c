"""Models of Hugging Face transformers cut into stages, compared bit for bit with the whole model.

transformers is needed for these tests only: ``pip install '.[frameworks]'``.
"""

from __future__ import annotations

import copy
import sys
import warnings
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor

import nesterov_pp as npp
from nesterov_pp.pipeline import StageModule, VirtualPipeline, causal_lm_loss, cut, load_weights
from nesterov_pp.pipeline.cutting.decoders import LAYOUTS
from nesterov_pp.pipeline.stage import run_stage

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", minversion="5")

pytestmark = [pytest.mark.filterwarnings("ignore")]  # from transformers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATER = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = {"sliding_window": 3}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 32},
    "gpt_neox": {"intermediate_size": 48},
    "mistral": LATER | WINDOW,
    "mixtral": LATER | WINDOW | {"num_local_experts": 4},
    "qwen2": LATER | WINDOW | {"use_sliding_window": True, "max_window_layers": 2},
    "qwen2_moe": LATER | EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": LATER | EXPERTS,
    "gemma2": LATER | WINDOW,
    "gemma3_text": LATER | WINDOW,
}


def made(kind: str, attention: str = "sdpa", **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **{**OWN.get(kind, LATER), **options})
    config.use_cache = False  # a cache copies keys and values, which may choose other kernels
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def tokens(seed: int, rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def masked(ids: Tensor, side: str, row: int = 1, count: int = 4) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    mask[row, slice(0, count) if side == "left" else slice(-count, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run(stages: list[StageModule], value: Any) -> Any:
    for stage in stages:
        value = run_stage(stage, value)
    return value


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [kind for kind in LAYOUTS if kind != "gemma2"])
def test_logits_and_names(kind, attention):
    model = made(kind, attention).eval()
    whole = copy.deepcopy(model)
    stages = cut(model, 3, untie=True)
    assert [name for stage in stages for name in stage.state_dict()] == list(whole.state_dict())
    inputs = [masked(tokens(1), "left"), masked(tokens(2, 2, 12), "right")]
    inputs.append({"input_ids": tokens(3, 2, 6), "position_ids": torch.arange(2, 8).expand(2, 6)})
    inputs.append({"input_ids": tokens(3, 1, 6), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1]])})  # packed
    inputs.append({"inputs_embeds": torch.randn(2, 5, 32)})
    for given in inputs:
        assert torch.equal(run(stages, given), whole(**given).logits)
    assert isinstance(stages[0](tokens(4)), Tensor)
    assert torch.equal(run(stages, tokens(4)), whole(tokens(4)).logits)


def test_logits_and_names_of_eager_attention_only():
    test_logits_and_names("gemma2", "eager")


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [("gpt2", ["embd_pdrop", "attn_pdrop", "resid_pdrop"]), ("gpt_neox", ["hidden_dropout", "attention_dropout"])],
)
def test_dropout_is_drawn_once(kind, dropout):
    model = made(kind, **dict.fromkeys(dropout, 0.2)).train()
    whole = copy.deepcopy(model)
    torch.manual_seed(1)
    expected = whole(tokens(1)).logits
    torch.manual_seed(1)
    assert torch.equal(run(cut(model, 4, untie=True), tokens(1)), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gradients_with_gradient_checkpointing(kind, reentrant):
    model = made(kind, **({"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0} if kind == "gpt2" else {}))
    whole = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    stages, given = cut(model, 3, untie=True), masked(tokens(1), "left")
    loss, expected = (causal_lm_loss(logits, tokens(1)) for logits in (run(stages, given), whole(**given).logits))
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    found = {name: p.grad for stage in stages for name, p in stage.named_parameters()}
    for name, p in whole.named_parameters():
        if "lm_head" in found and "wte" in name:  # tied in the whole model
            assert torch.equal(p.grad, found[name] + found["lm_head.weight"])
        elif "wte" not in name:
            assert torch.equal(p.grad, found[name])


def train(model: Any, pipe: VirtualPipeline) -> list[tuple[Tensor, Tensor]]:
    """Return the losses of 22 updates of the pipeline and of ordinary training, with masks and changing lengths."""
    defaults = pipe.optimizers[0].defaults
    rule = type(pipe.optimizers[0])
    optimizer = rule(
        model.parameters(), **{key: defaults[key] for key in signature(rule).parameters if key in defaults}
    )
    losses = []
    for m in range(22):
        ids = tokens(m, 2, 5 + m % 4)
        given = masked(ids, "left" if m % 2 else "right", count=m % 3 + 1)
        labels = ids.masked_fill(given["attention_mask"] == 0, -100)
        torch.manual_seed(m)
        loss = model(**given, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.manual_seed(m)
        losses.append((pipe.step(given, labels), loss.detach()))
    return losses


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma", "qwen3_moe"])
def test_one_stage_trains_as_the_model_does(kind):
    """GPT-2 has dropout, and its embeddings and those of Gemma are tied."""
    model = made(kind).train()
    whole = copy.deepcopy(model)
    pipe = VirtualPipeline(cut(model, 1), causal_lm_loss, method="nesterov", lr=1e-2)
    assert all(torch.equal(*pair) for pair in train(whole, pipe))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_stages_that_wait_train_as_the_model_does(recompute):
    model = made("llama").train()
    whole = copy.deepcopy(model)
    stages = cut(model, 3)
    pipe = VirtualPipeline(
        stages, causal_lm_loss, method="gpipe", lr=1e-2, microbatches_per_update=1, recompute=recompute
    )
    assert all(torch.equal(*pair) for pair in train(whole, pipe))


def test_an_untied_model_is_saved_untied(tmp_path):
    model = made("qwen2", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head.weight is tied to model.embed_tokens.weight"):
        cut(model, 2)
    assert model.config.tie_word_embeddings
    pipe = VirtualPipeline(cut(model, 2, untie=True), causal_lm_loss, lr=1e-2)
    pipe.step(tokens(1), tokens(1))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens(2)).logits, pipe.predict(tokens(2)))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3_text"])
def test_each_process_loads_its_own_stage(kind, tmp_path):
    saved = made(kind, tie_word_embeddings=kind != "llama").eval()
    saved.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.device("meta"):
        model = made(kind, tie_word_embeddings=kind != "llama")
    stages = cut(model, 3, untie=True)
    for stage in stages:
        assert all(t.is_meta for t in stage.state_dict().values())
        load_weights(stage.eval(), tmp_path)
    given = masked(tokens(1), "left")
    assert torch.equal(run(stages, given), saved(**given).logits)


def test_adapters_of_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(made("llama"), config).eval()
    whole = copy.deepcopy(model)
    stages = cut(model, 3)
    assert [name for stage in stages for name in stage.state_dict()] == list(whole.state_dict())
    given = masked(tokens(1), "right")
    assert torch.equal(run(stages, given), whole(**given).logits)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    pipe = VirtualPipeline(stages, causal_lm_loss, lr=1e-2)
    for m in range(3):
        pipe.step(tokens(m), tokens(m))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, whole.get_parameter(name))}
    assert moved == {name for name, _ in model.named_parameters()} - set(frozen)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"prompt_encoder.* is no part of the decoder"):
        cut(peft.get_peft_model(made("llama"), prompt), 2)


def t5() -> Any:
    config = transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def classifier() -> Any:
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES, **LATER))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (t5, "T5ForConditionalGeneration has an encoder and a decoder"),
        (classifier, "is no causal language model"),
        (lambda: made("llama").model, "is no causal language model"),
        (lambda: made("granite"), r"does not know the layout of GraniteForCausalLM \('granite'\)"),
        (lambda: made("mixtral", output_router_logits=True), "set model.config.output_router_logits = False"),
    ],
)
def test_what_cannot_be_cut(model, message):
    with pytest.raises(ValueError, match=message):
        cut(model(), 2)


def test_an_old_version_is_named(monkeypatch):
    model = made("llama")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ValueError, match=r"cutting a LlamaForCausalLM needs transformers 5 or newer, not 4.57.1"):
        cut(model, 2)


def test_labels_are_targets():
    stage = cut(made("llama"), 2)[0]
    with pytest.raises(ValueError, match="takes input_ids, attention_mask, position_ids, not labels; labels are the"):
        stage(input_ids=tokens(1), labels=tokens(1))
    assert npp.pipeline.cut is cut


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_trained_pipeline_is_a_folder_of_transformers(kind, tmp_path):
    """Also where the ring holds predicted weights."""
    pytest.importorskip("safetensors")
    model = made(kind)
    pipe = VirtualPipeline(cut(model, 3, untie=True), causal_lm_loss, "xpipe", lr=1e-3)
    for m in range(5):
        pipe.step(tokens(m), tokens(m))
    pipe.export(tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert torch.equal(again(tokens(9), use_cache=False).logits, pipe.predict(tokens(9)))
    assert again.generate(tokens(9), max_new_tokens=2, do_sample=False).shape == (3, 11)
