"""Text generation from a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def generate(
    predict: Callable[[Tensor], Tensor],
    prompt: Tensor,
    length: int,
    *,
    context: int,
    temperature: float,
    seed: int,
) -> list[int]:
    """Return ``length`` tokens that continue ``prompt``, drawn one by one from ``softmax(logits / temperature)``.

    Args:
        predict: maps ``(1, n)`` int64 tokens, n <= context, to logits ``(1, n, vocabulary)``.
        prompt: 1-d tokens, at least one.
        context: the number of last tokens that ``predict`` is given.
        seed: seed of the draws; the same seed gives the same text.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt.long()
    for _ in range(length):
        logits = predict(tokens[None, -context:])[0, -1].float().cpu()
        drawn = torch.multinomial(torch.softmax(logits / temperature, dim=0), 1, generator=generator)
        tokens = torch.cat([tokens, drawn])
    drawn_tokens: list[int] = tokens[len(prompt) :].tolist()
    return drawn_tokens


def printable(text: str) -> str:
    """Replace control characters, which could move a terminal's cursor, by U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
