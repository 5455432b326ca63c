"""Measure which eight-bit or sixteen-bit codes of a second moment follow it: ``python -m benchmarks.eight_bit_decay``.

Gradients of random sizes are averaged for 2,000 steps, then shrink tenfold, as after a warm-up. Printed is the root of
the second moment over that in float32: the median, the 5 % and the 95 % quantile. With ``--losses``, NAdam trains a
small transformer on the text of Python's standard library with each of them, and validation losses are printed.
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import nesterov_pp as npp
from nesterov_pp.kernels import codes
from nesterov_pp.training.model import build_stages, next_token_loss

ELEMENTS = 32 * 64
SHRINKS, STEPS = 2000, 6000
PRINTED = (1999, 2499, 3999, 5999)


def nearest(v: Tensor) -> Tensor:
    return codes.decode_second(codes.encode_second(v.sqrt()))


def random_value(v: Tensor) -> Tensor:
    """Round so that v, not sqrt(v), is right on average."""
    s = v.view(-1, codes.GROUP)
    scale = s.amax(1, keepdim=True).clamp_min(2.0**-48)
    t = s / scale * 65025
    q = t.sqrt().floor().clamp(max=255)
    q += torch.rand_like(t) * (2 * q + 1) < t - q * q
    return ((q / 255).square() * scale).flatten()


def random_root(v: Tensor) -> Tensor:
    return codes.decode_second(codes.encode_second(v.sqrt(), torch.randint(0, 1 << 16, v.shape)))


def sixteen(v: Tensor) -> Tensor:
    s = v.sqrt().view(-1, codes.GROUP)
    scale = s.amax(1, keepdim=True).clamp_min(2.0**-24)
    return ((s / scale * 65535).round() / 65535 * scale).square().flatten()


CODES: dict[str, Callable[[Tensor], Tensor]] = {
    "8 bits, nearest": nearest,
    "8 bits, sqrt(v) at random": random_root,
    "8 bits, v at random": random_value,
    "16 bits, nearest": sixteen,
}


def text() -> Tensor:
    """Return the bytes of some modules of the standard library, the last twentieth for validation."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8).long()


def validation_loss(code: Callable[[Tensor], Tensor] | None, seed: int, steps: int, lr: float = 1e-3) -> float:
    """Train with second moments in a code (None: float32) and all else in float32; return the validation loss."""
    data, context = text(), 64
    parts = data[: -len(data) // 20], data[-len(data) // 20 :]
    drawn, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    torch.manual_seed(seed)  # of the codes' noise

    def batch(part: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(part) - context - 1, (8,), generator=generator).tolist()
        rows = torch.stack([part[k : k + context + 1] for k in starts])
        return rows[:, :-1], rows[:, 1:]

    shape = {"layers": 2, "width": 64, "heads": 4, "context": context}
    net = build_stages(vocabulary=256, stages=1, dropout=0.0, seed=seed, **shape)[0]
    optimizer = npp.NAdam(net.parameters(), lr=lr, betas=(0.99, 0.999))
    for t in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (t + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * t / steps))
        inputs, targets = batch(parts[0], drawn)
        optimizer.zero_grad()
        torch.autograd.backward(next_token_loss(net(inputs), targets))
        optimizer.step()
        if code is None:
            continue
        for v in (entries["exp_avg_sq"] for entries in optimizer.state.values()):
            flat = torch.nn.functional.pad(v.flatten(), (0, -v.numel() % codes.GROUP))
            v.copy_(code(flat)[: v.numel()].view_as(v))
    with torch.no_grad():
        pairs = [batch(parts[1], fixed) for _ in range(32)]
        return sum(float(next_token_loss(net(x), y)) for x, y in pairs) / len(pairs)


def losses(steps: int, seeds: int) -> None:
    """Print a table of validation losses."""
    print("| second moments | " + " | ".join(f"seed {s}" for s in range(seeds)) + " | mean |")
    print("|---|" + "--:|" * (seeds + 1))
    for name, code in {"float32": None, **CODES}.items():
        found = [validation_loss(code, seed, steps) for seed in range(seeds)]
        print(f"| {name} | " + " | ".join(f"{x:.4f}" for x in [*found, sum(found) / seeds]) + " |", flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eight_bit_decay", description=__doc__)
    parser.add_argument("--losses", action="store_true", help="train instead")
    parser.add_argument("--steps", type=int, default=600, help="steps of a training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings with each code (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.losses:
        losses(options.steps, options.seeds)
        return 0
    torch.manual_seed(0)
    sizes = torch.exp(torch.randn(ELEMENTS))
    for beta2 in (0.999, 0.95):
        exact = torch.zeros(ELEMENTS)
        kept = {name: torch.zeros(ELEMENTS) for name in CODES}
        print(f"beta2 = {beta2}")
        for t in range(STEPS):
            g = torch.randn(ELEMENTS) * sizes * (1.0 if t < SHRINKS else 0.1) + 0.02 * sizes
            exact += (1 - beta2) * (g * g - exact)
            for name, code in CODES.items():
                kept[name] = code(kept[name] * beta2 + (1 - beta2) * g * g)
            if t in PRINTED:
                for name, v in kept.items():
                    low, median, high = (v.sqrt() / exact.sqrt()).quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
                    print(f"  after {t + 1:4} steps, {name:26} {median:.3f} ({low:.3f} to {high:.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
