"""Stages that hand on nests of changing shapes, as strangers' models do, with their data and losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy import CLASSES, WIDTH

IGNORED = -100
SCENARIOS: dict[str, dict[str, Any]] = {
    "nests": {},
    "nests-weighted": {"microbatches_per_update": 3},
    "nests-no-stash": {"method": "nesterov-no-stash", "correction_updates": 20, "microbatches_per_update": 2},
    "nests-clipped": {"microbatches_per_update": 2, "max_grad_norm": 0.2, "clip_over": "pipeline"},
    "nests-over-slow-links": {"microbatches_per_update": 2, "wire": "int8", "slack": 3},
    "nests-recomputed": {"recompute": True, "method": "nesterov-rotated"},
}


class Ids(nn.Module):
    """Embeds ids; hands on a dict with the ids themselves, a mask or None, and a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        return {"hidden": self.embed(ids), "rest": (ids, [mask]), "length": ids.shape[1]}


class Middle(nn.Module):
    """Begins in place, embeds the ids again, and hands on a transposed view."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.lstm = nn.Embedding(CLASSES, WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, hidden: Tensor, rest: tuple[Tensor, list[Tensor | None]], length: int) -> tuple[Any, ...]:
        ids, (mask,) = rest
        hidden.mul_(2.0)
        output, _ = self.lstm(hidden + self.again(ids) / length)
        return output.transpose(0, 1), mask


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        hidden = hidden.transpose(0, 1)
        return self.out(hidden if mask is None else hidden * mask.unsqueeze(-1))


def model() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Ids(), Middle(), Head()]


def batch(m: int) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """Return a microbatch whose number of sequences and length depend on ``m``; every third has no mask."""
    draw = torch.Generator().manual_seed(m)
    rows, length = (int(torch.randint(low, high, (), generator=draw)) for low, high in ((1, 5), (2, 9)))
    ids = torch.randint(CLASSES, (rows, length), generator=draw)
    mask = None if m % 3 == 0 else (torch.rand(rows, length, generator=draw) < 0.8).float()
    labels = (3 * ids + 1) % CLASSES
    if mask is not None:
        labels = labels.masked_fill(mask == 0, IGNORED)
    return {"ids": ids, "mask": mask}, {"labels": labels}


def sum_and_weight(logits: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sum over the valid tokens, and their number."""
    labels = targets["labels"].flatten()
    total = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")
    return total, (labels != IGNORED).sum()


def mean(logits: Tensor, targets: dict[str, Tensor]) -> Tensor:
    total, weight = sum_and_weight(logits, targets)
    return total / weight.clamp(min=1)
