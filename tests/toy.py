"""A small model cut into stages, and its data by microbatch number."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, CLASSES = 12, 5


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.dropout(self.down(torch.tanh(self.up(self.norm(x)))), self.dropout, self.training)


def model(stages: int, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    torch.manual_seed(0)
    modules: list[nn.Module] = [Block(dropout) for _ in range(stages)]
    modules[0] = nn.Sequential(nn.Embedding(CLASSES, WIDTH), modules[0])
    modules[-1] = nn.Sequential(modules[-1], nn.Linear(WIDTH, CLASSES))
    return [m.to(dtype) for m in modules]


def microbatch(m: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10_000 + m)
    x = torch.randint(CLASSES, (8,), generator=generator)
    return x, (3 * x + 1) % CLASSES
