"""Text tasks, for an encoder-decoder and for the decoder-only model of ``train``."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.task import Task
from nesterov_pp.pipeline import VirtualPipeline
from nesterov_pp.training.config import UserError
from nesterov_pp.training.data import Corpus, read_text, tokenize
from nesterov_pp.training.model import build_stages, next_token_loss
from nesterov_pp.training.tokenizer import ByteTokenizer

WIDTH, HEADS, SOURCE, TARGET = 64, 4, 64, 32
STAGES = 8
METHODS = ("nesterov", "pipedream", "gpipe", "gpipe-1")


class Encoder(nn.Module):
    """An encoder layer over the whole source, which passes the target's bytes on."""

    def __init__(self, *, embeds: bool) -> None:
        super().__init__()
        self.embedding = _Embedding(SOURCE) if embeds else nn.Identity()
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(self.embedding(source)), target


class Decoder(nn.Module):
    """A causal decoder layer over the target, which attends to the encoder's output."""

    def __init__(self, *, embeds: bool, ends: bool) -> None:
        super().__init__()
        self.embedding = _Embedding(TARGET) if embeds else nn.Identity()
        self.layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)) if ends else None

    def forward(self, memory: Tensor, target: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        hidden = self.layer(self.embedding(target), memory, tgt_mask=mask, tgt_is_causal=True)
        return (memory, hidden) if self.out is None else self.out(hidden)


class _Embedding(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(length, WIDTH))
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.tokens(tokens) + self.positions
        return hidden


def encoder_decoder() -> list[nn.Module]:
    """Return four encoder stages and four decoder stages."""
    half = STAGES // 2
    encoders: list[nn.Module] = [Encoder(embeds=k == 0) for k in range(half)]
    return encoders + [Decoder(embeds=k == 0, ends=k == half - 1) for k in range(half)]


def continuation(data: str | None, batch: int) -> Task:
    """Return the continuation task: the encoder reads 64 bytes, the decoder continues them by 32."""
    corpus, name = _corpus(data, SOURCE + TARGET)

    def split(rows: tuple[Tensor, Tensor]) -> tuple[Any, Tensor]:
        before, after = rows[0], rows[1]
        return (before[:, :SOURCE], before[:, SOURCE:]), after[:, SOURCE:]

    held_out = [split(rows) for rows in corpus.validation_batches(32, 16, SOURCE + TARGET)]
    return Task(
        f"An encoder-decoder of width {WIDTH} continues {SOURCE} bytes of {name} by {TARGET}",
        METHODS,
        encoder_decoder,
        next_token_loss,
        lambda generator: split(_draw(corpus, generator, batch, SOURCE + TARGET)),
        lambda pipe: _loss(pipe, held_out),
    )


def language(data: str | None, batch: int) -> Task:
    """Return the language task: the model that ``train`` trains, on 64 bytes."""
    corpus, name = _corpus(data, SOURCE)
    held_out = corpus.validation_batches(32, 16, SOURCE)

    def stages() -> list[nn.Module]:
        seed = int(torch.randint(1 << 30, ()))
        return build_stages(
            vocabulary=256,
            stages=STAGES,
            layers=STAGES,
            width=WIDTH,
            heads=HEADS,
            context=SOURCE,
            dropout=0.0,
            seed=seed,
        )

    return Task(
        f"A language model of width {WIDTH} on {name}",
        METHODS,
        stages,
        next_token_loss,
        lambda generator: _draw(corpus, generator, batch, SOURCE),
        lambda pipe: _loss(pipe, held_out),
    )


def _corpus(data: str | None, context: int) -> tuple[Corpus, str]:
    try:
        text = read_text(data)
        return tokenize(text, ByteTokenizer(), context), text.name
    except UserError as error:
        raise ValueError(str(error)) from None


def _draw(corpus: Corpus, generator: torch.Generator, batch: int, context: int) -> tuple[Tensor, Tensor]:
    number = int(torch.randint(1 << 30, (), generator=generator))
    return corpus.batch(0, number, batch, context)


def _loss(pipe: VirtualPipeline, batches: list[tuple[Any, Tensor]]) -> dict[str, float]:
    return {"loss": fmean(float(pipe.evaluate(*batch)) for batch in batches)}
