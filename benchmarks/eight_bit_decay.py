"""Measure which eight-bit or sixteen-bit codes of a second moment follow it: ``python -m benchmarks.eight_bit_decay``.

Gradients of random sizes are averaged for 2,000 steps, then shrink tenfold, as after a warm-up. Printed is the root of
the second moment over that in float32: the median, the 5 % and the 95 % quantile.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from nesterov_pp.kernels import codes

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


def main() -> int:
    torch.set_num_threads(1)
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
    sys.exit(main())
