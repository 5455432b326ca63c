"""A small residual network on images through delayed pipelines: ``python -m benchmarks.images --data cifar10``.

``--data`` is a folder with ``train.zip`` and ``test.zip`` of 32 x 32 pictures in folders named by their class. Every
method has the same three learning rates for its kind of rule, and is judged by the best; prints a table.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
import zipfile
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nesterov_pp.pipeline import VirtualPipeline, find_recipe

METHODS = ("nesterov-sgd", "nesterov", "pipedream", "gpipe", "gpipe-1")
RATES = {True: (3e-4, 1e-3, 3e-3), False: (0.03, 0.1, 0.3)}
"""By whether the rule has a second moment."""


class Residual(nn.Module):
    """Two 3 x 3 convolutions around a shortcut; group normalisation, since a microbatch is small."""

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
    """Eight: the first convolution, six residual blocks, the classifier."""
    w = width
    blocks = [Residual(w, w), Residual(w, w), Residual(w, 2 * w, 2), Residual(2 * w, 2 * w)]
    blocks += [Residual(2 * w, 4 * w, 2), Residual(4 * w, 4 * w)]
    head = nn.Sequential(
        nn.GroupNorm(4, 4 * w), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, classes)
    )
    return [nn.Conv2d(3, w, 3, 1, 1, bias=False), *blocks, head]


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Pictures [N, 3, 32, 32], float32 of mean 0 and deviation 1, and classes [N] in the order of their names."""
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


def train(
    method: str, lr: float, seed: int, data: tuple[Tensor, Tensor], microbatches: int, batch: int
) -> tuple[VirtualPipeline, float]:
    """The trained pipeline and the seconds it took; linear warm-up over a tenth, then a cosine to a tenth."""
    x, y = data
    torch.manual_seed(seed)
    late: dict[str, Any] = {}
    if find_recipe(method).correction_updates is not None:
        late["correction_updates"] = microbatches // 7
    pipe = VirtualPipeline(stages(int(y.max()) + 1), F.cross_entropy, method, lr, max_grad_norm=10.0, **late)
    order = torch.Generator().manual_seed(seed)
    begin = time.perf_counter()
    for m in range(microbatches):
        warm = min(1.0, (m + 1) / (0.1 * microbatches))
        pipe.lr = lr * warm * (0.1 + 0.45 * (1.0 + float(torch.cos(torch.tensor(torch.pi * m / microbatches)))))
        chosen = torch.randint(len(x), (batch,), generator=order)
        images = x[chosen]
        flipped = torch.rand(batch, 1, 1, 1, generator=order) < 0.5
        pipe.step(torch.where(flipped, images.flip(3), images), y[chosen])
    return pipe, time.perf_counter() - begin


def judge(pipe: VirtualPipeline, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Loss in nats and share of pictures that are classified right."""
    outputs = torch.cat([pipe.predict(part) for part in torch.split(data[0], 500)])
    return float(F.cross_entropy(outputs, data[1])), float((outputs.argmax(1) == data[1]).float().mean())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--microbatches", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(argv)
    if not all((given.data / name).is_file() for name in ("train.zip", "test.zip")):
        print(f"{given.data} has no train.zip and test.zip", file=sys.stderr)
        return 2
    torch.set_num_threads(given.threads)
    training, test = read(given.data / "train.zip"), read(given.data / "test.zip")
    print(
        f"8 stages, {sum(p.numel() for m in stages(10) for p in m.parameters()):,} parameters, "
        f"{len(training[0]):,} + {len(test[0]):,} pictures, {given.microbatches} microbatches of {given.batch}, "
        f"{given.seeds} seed(s), torch {torch.__version__}\n\n"
        "| method | lr | test loss | accuracy | accuracy at each rate | seconds |\n|---|--:|--:|--:|---|--:|"
    )
    for method in given.methods.split(","):
        rows = []
        adaptive = bool(getattr(find_recipe(method).rule, "_adaptive", True))
        for lr in RATES[adaptive]:
            runs = [train(method, lr, seed, training, given.microbatches, given.batch) for seed in range(given.seeds)]
            results = [judge(pipe, test) for pipe, _ in runs]
            loss, accuracy = (fmean(values) for values in zip(*results, strict=True))
            rows.append((loss, lr, accuracy, fmean(seconds for _, seconds in runs)))
        loss, lr, accuracy, seconds = min(row for row in rows if row[0] == row[0])
        each = ", ".join(f"{100 * a:.1f} % ({rate:g})" for _, rate, a, _ in rows)
        print(f"| {method} | {lr:g} | {loss:.3f} | {100 * accuracy:.1f} % | {each} | {seconds:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
