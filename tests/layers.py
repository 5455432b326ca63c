"""Small layers, one for each way in which a backward can need its weights."""

from __future__ import annotations

import torch
from torch import nn


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class MatMul(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Tokens(nn.Module):
    """An embedding of tokens taken from the signs of its input, so that its input is float like that of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table((x[..., 0] > 0).long()) * x


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x.transpose(-1, -2)).transpose(-1, -2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


LAYERS = {
    "linear": lambda: nn.Linear(8, 8),
    "linear without bias": lambda: nn.Linear(8, 8, bias=False),
    "layernorm": lambda: nn.LayerNorm(8),
    "rmsnorm": lambda: nn.RMSNorm(8),
    "convolution": Convolution,
    "gain": Gain,
    "matmul": MatMul,
    "embedding": Tokens,
    "tied": Tied,
    "lstm": Recurrent,
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
    "batchnorm": lambda: nn.Sequential(Convolution(), nn.Flatten(0, 1), nn.BatchNorm1d(8)),
}


def layer(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = LAYERS[kind]()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    return module.double()


def data(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(y: torch.Tensor) -> torch.Tensor:
    return (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)).sum()


def gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(objective(module(x)), [x, *module.parameters()]))
