"""The image task: a small residual network on 32 x 32 pictures, in zip files with a folder for each class."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.task import Task
from nesterov_pp.pipeline import VirtualPipeline

METHODS = ("nesterov-sgd", "nesterov", "pipedream", "gpipe", "gpipe-1")


class Residual(nn.Module):
    """Two 3 x 3 convolutions with a shortcut, and group normalisation, since a microbatch is small."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, width_in), nn.GroupNorm(4, width)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        plain = width_in == width and stride == 1
        self.shortcut = nn.Identity() if plain else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.relu(self.norm1(x)))
        out: Tensor = self.shortcut(x) + self.conv2(F.relu(self.norm2(hidden)))
        return out


def stages(classes: int, width: int = 16) -> list[nn.Module]:
    """Return eight stages: the first convolution, six residual blocks, and the classifier."""
    w = width
    blocks = [Residual(w, w), Residual(w, w), Residual(w, 2 * w, 2), Residual(2 * w, 2 * w)]
    blocks += [Residual(2 * w, 4 * w, 2), Residual(4 * w, 4 * w)]
    head = nn.Sequential(
        nn.GroupNorm(4, 4 * w), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, classes)
    )
    return [nn.Conv2d(3, w, 3, 1, 1, bias=False), *blocks, head]


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Return pictures [N, 3, 32, 32], float32 with mean 0 and deviation 1, and classes [N] in the order of names."""
    from PIL import Image

    pictures, names = [], []
    with zipfile.ZipFile(path) as file:
        for name in sorted(n for n in file.namelist() if n.lower().endswith((".jpg", ".jpeg", ".png"))):
            with Image.open(io.BytesIO(file.read(name))) as image:
                pictures.append(np.asarray(image.convert("RGB"), dtype=np.float32))
            names.append(Path(name).parent.name)
    order = sorted(set(names))
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1.0
    return (x - x.mean()) / x.std(), torch.tensor([order.index(name) for name in names])


def task(data: Path | None, batch: int) -> Task:
    """Return the task for a folder with ``train.zip`` and ``test.zip``, by default for scikit-learn's digits.

    Raises:
        ValueError: the folder has no such files, or scikit-learn is not installed.
    """
    (x, y), test, name = _digits() if data is None else _pictures(data)

    def microbatch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(x), (batch,), generator=generator)
        images = x[chosen]
        if data is None:  # a mirrored digit is not a digit
            return images, y[chosen]
        flipped = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
        return torch.where(flipped, images.flip(3), images), y[chosen]

    return Task(
        f"A residual network on {len(x):,} + {len(test[0]):,} pictures ({name})",
        METHODS,
        lambda: stages(int(y.max()) + 1),
        F.cross_entropy,
        microbatch,
        lambda pipe: judge(pipe, test),
    )


def judge(pipe: VirtualPipeline, data: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return the loss in nats and the share of pictures classified correctly."""
    outputs = torch.cat([pipe.predict(part) for part in torch.split(data[0], 500)])
    loss = float(F.cross_entropy(outputs, data[1]))
    return {"loss": loss, "accuracy": float((outputs.argmax(1) == data[1]).float().mean())}


def _pictures(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], str]:
    if not all((folder / name).is_file() for name in ("train.zip", "test.zip")):
        raise ValueError(f"{folder} must contain train.zip and test.zip")
    return read(folder / "train.zip"), read(folder / "test.zip"), folder.name


def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], str]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("without --data this needs scikit-learn's digits; run `pip install scikit-learn`") from None
    digits = load_digits()
    x = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None], size=32).expand(-1, 3, -1, -1)
    x, y = (x - x.mean()) / x.std(), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, last = x[order], y[order], len(x) // 5
    return (x[last:], y[last:]), (x[:last], y[:last]), "scikit-learn's digits"
