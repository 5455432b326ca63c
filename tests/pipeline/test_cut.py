"""Models cut into stages: the outputs, gradients and names are those of the whole model."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nesterov_pp.pipeline import StageModule, VirtualPipeline, causal_lm_loss, cut, load_weights
from nesterov_pp.pipeline.stage import run_stage


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        kept = x if self.downsample is None else self.downsample(x)
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + kept).relu()


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.layer1 = nn.Sequential(Block(4, 4, 1), Block(4, 4, 1))
        self.layer2 = nn.Sequential(Block(4, 8, 2), Block(8, 8, 1))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.avgpool(self.layer2(self.layer1(x))).flatten(1))


RESNET: dict[str, Any] = {
    "before": ["conv1", "bn1", "relu"],
    "layers": ["layer1", "layer2"],
    "after": lambda model, x: model.fc(model.avgpool(x).flatten(1)),
}


class Gpt(nn.Module):
    """A small decoder with tied embeddings, whose layers are given a mask and a table of the model."""

    def __init__(self, layers: int = 4, *, tied: bool = True) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"tokens": nn.Embedding(16, 8), "drop": nn.Dropout(0.1)})
        self.positions = nn.Parameter(torch.randn(6, 8))
        self.register_buffer("table", torch.arange(8.0) / 8.0, persistent=False)
        self.body["blocks"] = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 8, 0.0) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 16, bias=False)
        if tied:
            self.head.weight = self.body["tokens"].weight

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x, mask = embed(self, ids, mask)
        for block in self.body["blocks"]:
            x = call(self, block, x, mask)
        return predict(self, x, mask)


def embed(model: Any, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    return model.body["drop"](model.body["tokens"](ids) + model.positions[: ids.shape[-1]]), mask


def call(model: Any, block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    return block(x * model.table, mask)


def predict(model: Any, x: Tensor, _: Tensor | None) -> Tensor:
    return model.head(model.norm(x))


GPT: dict[str, Any] = {"before": embed, "layers": "body.blocks", "each": call, "after": predict}


def made(kind: type[nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(**options)


def run(stages: list[StageModule], value: Any) -> Any:
    for stage in stages:
        value = run_stage(stage, value)
    return value


def names(stages: list[StageModule]) -> list[str]:
    return [name for stage in stages for name in stage.state_dict()]


@pytest.mark.parametrize("stages", [1, 3, 6, [0, 3, 1], [2, 2]])
def test_a_resnet(stages):
    model = made(ResNet)
    whole, x = copy.deepcopy(model), torch.randn(4, 3, 8, 8)
    cuts = cut(model, stages, **RESNET)
    assert names(cuts) == list(whole.state_dict())
    output, expected = run(cuts, x), whole(x)
    assert torch.equal(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    parameters = dict(whole.named_parameters())
    for stage in cuts:
        for name, p in stage.named_parameters():
            assert torch.equal(p.grad, parameters[name].grad)
        for name, buffer in stage.named_buffers():
            assert torch.equal(buffer, whole.get_buffer(name))


@pytest.mark.parametrize("masked", [False, True])
def test_a_decoder_with_context(masked):
    model = made(Gpt, tied=False).eval()
    ids = torch.randint(16, (6, 3))
    mask = torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1) > 0, -torch.inf) if masked else None
    cuts = cut(model, 3, **GPT)
    assert torch.equal(run(cuts, {"ids": ids, "mask": mask}), model(ids, mask))
    assert torch.equal(run(cuts, (ids, mask)), model(ids, mask))
    assert sorted(names(cuts)) == sorted(model.state_dict())
    assert not torch.equal(model(ids, mask), model.train()(ids, mask))
    torch.manual_seed(1)
    expected = model(ids, mask)
    torch.manual_seed(1)
    assert torch.equal(run([stage.train() for stage in cuts], (ids, mask)), expected)


def test_a_sequential_keeps_its_names():
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    cuts = cut(model, 3)
    assert names(cuts) == list(model.state_dict())
    x = torch.randn(4, 2)
    assert torch.equal(run(cuts, x), model(x))


def test_one_stage_trains_as_the_model_does():
    model = made(ResNet)
    whole = copy.deepcopy(model)
    pipe = VirtualPipeline(cut(model, 1, **RESNET), F.cross_entropy, method="pipedream", lr=1e-2)
    defaults = pipe.optimizers[0].defaults
    optimizer = type(pipe.optimizers[0])(
        whole.parameters(), **{key: defaults[key] for key in ("lr", "betas", "weight_decay")}
    )
    for m in range(20):
        x = torch.randn(2 + m % 3, 3, 8, 8, generator=torch.Generator().manual_seed(m))
        y = torch.arange(len(x)) % 5
        loss = F.cross_entropy(whole(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.equal(pipe.step(x, y), loss.detach())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_parameters_are_balanced_with_what_surrounds_the_layers():
    """Two tables as large as six layers leave the layers to the stages between them."""
    model = nn.Module()
    model.tokens, model.head = nn.Embedding(60, 10), nn.Linear(10, 60, bias=False)
    model.blocks = nn.ModuleList([nn.Linear(10, 10, bias=False) for _ in range(12)])
    cuts = cut(model, 4, layers="blocks", before="tokens", after="head")
    assert [sum(p.numel() for p in stage.parameters()) for stage in cuts] == [600] * 4
    assert [len(stage.state_dict()) for stage in cuts] == [1, 6, 6, 1]


def test_a_stage_holds_nothing_of_the_others():
    model = made(ResNet)
    others = [weakref.ref(model), weakref.ref(model.conv1), weakref.ref(model.layer1[0]), weakref.ref(model.fc)]
    stage = cut(model, [1, 2, 1], **RESNET)[1]
    own = weakref.ref(stage.get_submodule("layer2.0"))
    del model
    gc.collect()
    assert [other() for other in others] == [None] * 4
    assert own() is not None
    copied = copy.deepcopy(stage)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(copied.eval()(x), stage.eval()(x))
    assert copied.get_parameter("layer1.1.conv1.weight") is not stage.get_parameter("layer1.1.conv1.weight")


def test_tied_parameters_are_refused_or_untied():
    model = made(Gpt)
    with pytest.raises(ValueError, match=r"head.weight is tied to body.tokens.weight, .* untie=True"):
        cut(model, 2, **GPT)
    model.forward = lambda ids: ids
    with pytest.raises(ValueError, match="the forward of the model was replaced"):
        cut(model, 2, untie=True, **GPT)
    del model.forward
    assert model.head.weight is model.body["tokens"].weight
    assert len(list(cut(model, 1, **GPT)[0].parameters())) == len(list(model.parameters()))
    cuts = cut(model, 2, untie=True, **GPT)
    assert torch.equal(model.head.weight, model.body["tokens"].weight)
    assert model.head.weight is not model.body["tokens"].weight
    assert [stage.copied_from for stage in cuts] == [{}, {"head.weight": "body.tokens.weight"}]


def test_a_layer_that_is_used_twice_is_on_one_stage():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Linear(4, 4), layer)
    with pytest.raises(ValueError, match=r"2.* are one module|2 and 0 are one module"):
        cut(model, 2, untie=True)
    cut(model, 1)


@pytest.mark.parametrize("form", ["mapping", "file", "folder"])
def test_only_the_own_weights_are_loaded_from_the_meta_device(form, tmp_path):
    saved = made(Gpt)
    weights: Any = saved.state_dict()
    if form == "mapping":
        del weights["head.weight"]  # as files have tied parameters
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        weights = tmp_path / "model.safetensors" if form == "file" else tmp_path
        safetensors.save_model(saved, str(tmp_path / "model.safetensors"))
    with torch.device("meta"):
        model = Gpt()
        model.table = torch.arange(8.0, device="cpu") / 8.0
    stages = cut(model, 3, untie=True, **GPT)
    load_weights(stages[1], weights)
    assert [{p.device.type for p in stage.parameters()} for stage in stages] == [{"meta"}, {"cpu"}, {"meta"}]
    load_weights(stages[0], weights)
    load_weights(stages[2], weights)
    ids = torch.randint(16, (6, 2))
    assert torch.equal(run([stage.eval() for stage in stages], (ids, None)), saved.eval()(ids))


def test_weights_that_do_not_fit_change_nothing(tmp_path):
    with torch.device("meta"):
        stage = cut(Gpt(), 2, untie=True, **GPT)[1]
    weights = Gpt().state_dict()
    with pytest.raises(ValueError, match=r"the weights have no norm\.bias"):
        load_weights(stage, {name: t for name, t in weights.items() if name != "norm.bias"})
    with pytest.raises(ValueError, match=r"norm.bias has shape \(8,\), but \(9,\)"):
        load_weights(stage, weights | {"norm.bias": torch.zeros(9)})
    with pytest.raises(ValueError, match="table is a buffer without values"):
        load_weights(stage, weights)
    with pytest.raises(FileNotFoundError, match="there are no weights at"):
        load_weights(stage, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no \*.safetensors in"):
        load_weights(stage, tmp_path)
    assert all(p.is_meta for p in stage.parameters())


def replaced_forward() -> nn.Module:
    model = made(ResNet)
    model.forward = lambda x: x
    return model


@pytest.mark.parametrize(
    ("model", "stages", "options", "message"),
    [
        (ResNet, 2, {}, "say with layers= where the layers of ResNet are.*'layer1', 'layer2'"),
        (ResNet, 2, {"before": "conv1"}, "need layers="),
        (ResNet, 2, {**RESNET, "layers": "blocks"}, "ResNet has no module 'blocks'; .*'layer1', 'layer2'"),
        (ResNet, 2, {"layers": ["layer1", "layer2"]}, "conv1.weight is in none of the layers"),
        (ResNet, 2, {**RESNET, "after": None}, "fc.weight is in none of the layers"),
        (ResNet, 7, RESNET, "4 layers and what comes before and after them cannot be cut into 7 stages; use 1 to 6"),
        (ResNet, 0, RESNET, "cannot be cut into 0 stages"),
        (ResNet, [2, 1], RESNET, "add up to 4"),
        (ResNet, [2, 0, 2], RESNET, "each at least 1"),
        (ResNet, 2, {**RESNET, "layers": ["layer1", "layer1.0"]}, "layer1.0 is among the layers more than once"),
        (ResNet, 2, {**RESNET, "before": ["conv1", "bn1", "layer1"]}, "layer1.* is named more than once"),
        (replaced_forward, 2, RESNET, "the forward of the model was replaced"),
        (lambda: nn.Sequential(), 1, {}, "the model has no layers"),
    ],
)
def test_what_cannot_be_cut(model, stages, options, message):
    with pytest.raises(ValueError, match=message):
        cut(model(), stages, **options)


def test_a_module_of_another_stage_is_named():
    stage = cut(made(ResNet), 3, **{**RESNET, "after": lambda model, x: model.conv1(x)})[2]
    with pytest.raises(RuntimeError, match="conv1 is on another stage"):
        stage(torch.randn(1, 8, 4, 4))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_of_a_causal_model(reduction):
    logits, labels = torch.randn(2, 5, 7, requires_grad=True), torch.randint(7, (2, 5))
    labels[1, 2:] = -100
    rows, targets = logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1)
    expected = F.cross_entropy(rows, targets)
    if reduction == "sum":
        total, weight = causal_lm_loss(logits, labels, reduction="sum")
        assert float(weight) == 5.0
        loss = total / weight
    else:
        loss = causal_lm_loss(logits, labels)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_a_microbatch_without_tokens_has_no_loss():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    loss = causal_lm_loss(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()
    with pytest.raises(ValueError, match=r"a shape of \(2, 3\), not \(2, 4\)"):
        causal_lm_loss(logits, torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="'mean' or 'sum', not 'none'"):
        causal_lm_loss(logits, torch.zeros(2, 3, dtype=torch.long), reduction="none")
