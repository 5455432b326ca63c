"""A GPT cut into pipeline stages: the architecture of the paper (arXiv 2505.01099, Section 5), of any size."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nesterov_pp.pipeline import ParamGroups
from nesterov_pp.training.config import derived_seed

INIT_STD = 0.02
Name = tuple[int, str]
"""A parameter, for any number of stages: its layer (0: embedding, 1 ...: blocks, last: head) and its name there."""


class Embedding(nn.Module):
    """Token and learned position embeddings: ``(batch, context)`` int64 to ``(batch, context, width)``."""

    def __init__(self, vocabulary: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.dropout(self.tokens(tokens) + self.positions[: tokens.shape[1]])
        return hidden


class Block(nn.Module):
    """Causal attention and a ReLU feed-forward layer, each on a normalised input and added to the residual stream."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, 4 * width)
        self.feed_out = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention_out(self._attend(self.attention_norm(x))))
        out: Tensor = x + self.dropout(self.feed_out(F.relu(self.feed_in(self.feed_norm(x)))))
        return out

    def _attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, length, width)


class Head(nn.Module):
    """The last norm and an untied output layer: ``(batch, context, width)`` to logits."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.norm(x))
        return logits


def build_stages(
    *, vocabulary: int, stages: int, layers: int, width: int, heads: int, context: int, dropout: float, seed: int
) -> list[nn.Module]:
    """Return the model as ``stages`` modules: embedding in the first, head in the last, blocks spread evenly.

    The initial weights of each layer depend on ``seed`` and the layer alone, whatever the number of stages. The global
    random state is left unchanged.
    """
    with torch.random.fork_rng(devices=[]):
        blocks = [_initialised(Block(width, heads, dropout), layers, seed, k) for k in range(layers)]
        embedding = _initialised(Embedding(vocabulary, context, width, dropout), layers, seed, "embedding")
        head = _initialised(Head(vocabulary, width), layers, seed, "head")
    result: list[nn.Module] = []
    for k in range(stages):
        parts = blocks[k * layers // stages : (k + 1) * layers // stages]
        if k == 0:
            parts = [embedding, *parts]
        if k == stages - 1:
            parts = [*parts, head]
        result.append(nn.Sequential(*parts))
    return result


def layers_of(stages: int, layers: int) -> list[list[int]]:
    """Return the layers of each stage, as ``build_stages`` cuts them: 0 is the embedding, ``layers + 1`` the head."""
    cut = [k * layers // stages for k in range(stages + 1)]
    result = [list(range(first + 1, last + 1)) for first, last in pairwise(cut)]
    result[0].insert(0, 0)
    result[-1].append(layers + 1)
    return result


def names_in_model(names: Iterable[str], layers: list[int]) -> list[Name]:
    """Return parameters that are named as in a stage with these layers by their names in the whole model."""
    parts = (name.split(".", 1) for name in names)
    return [(layers[int(place)], rest) for place, rest in parts]


def scaled_embeddings(scale: float) -> ParamGroups:
    """Return parameter groups in which the learning rate of the token and position embeddings is ``scale`` times.

    The groups hold the parameters in the order of ``stage.parameters()``.
    """

    def groups(stage: nn.Module) -> list[dict[str, Any]]:
        embedded = [p for m in stage.modules() if isinstance(m, Embedding) for p in m.parameters()]
        known = {id(p) for p in embedded}
        others = [p for p in stage.parameters() if id(p) not in known]
        return [{"params": embedded, "lr_scale": scale}, {"params": others}]

    return groups


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats, a 0-d tensor, computed in float32 if the logits are less precise.

    Args:
        logits: ``(batch, context, vocabulary)``.
        targets: ``(batch, context)`` int64.
    """
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def _initialised(layer: nn.Module, layers: int, seed: int, place: object) -> nn.Module:
    """Initialise a layer: weights N(0, 0.02), biases 0, gains 1.

    Weights that write to the residual stream are smaller by sqrt(2 layers).
    """
    torch.manual_seed(derived_seed("layer", seed, place))
    for name, p in layer.named_parameters():
        if "norm" in name or name.endswith("bias"):
            nn.init.constant_(p, 1.0 if name.endswith("weight") else 0.0)
        else:
            writes_stream = name in ("attention_out.weight", "feed_out.weight")
            nn.init.normal_(p, std=INIT_STD / math.sqrt(2 * layers) if writes_stream else INIT_STD)
    return layer
