"""Every method written again in float64 numpy from its equations, for stages small enough to differentiate by hand.

A stage is ``h = tanh(W h + b)``, the last one without the tanh, and the loss is the mean of squared errors. Nothing
here calls the package.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
WIDTH = 5
BATCH = 6


def microbatch(m: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(1_000 + m)
    x = rng.standard_normal((BATCH, WIDTH))
    return x, np.sin(2 * x) + 0.1 * rng.standard_normal((BATCH, WIDTH))


def first_weights(stage: int) -> Array:
    """Return W and b of a stage as one vector."""
    rng = np.random.default_rng(stage)
    w = rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)
    return np.concatenate([w.ravel(), 0.1 * rng.standard_normal(WIDTH)])


class Stage:
    """A stage's weights ``w``, the versions that forwards run with, and the method's update."""

    def __init__(self, w: Array, tau: int, lr: float) -> None:
        self.w, self.tau, self.lr = w, tau, lr
        self.forward = [w]
        self.t = 0

    def backward(self, version: int) -> Array:
        return self.forward[version]

    def update(self, g: Array, late: Array, delay: int) -> None:
        """Update with ``g``, which was computed with the weights ``late``, ``delay`` updates ago."""
        self.t += 1
        self.w = self.w - self.step(g, late, delay)
        self.forward.append(self.ahead())

    def step(self, g: Array, late: Array, delay: int) -> Array:
        raise NotImplementedError

    def ahead(self) -> Array:
        return self.w


Draw = Callable[[int], "list[int] | None"]


def train(stages: list[Stage], draw: Draw, microbatches: int, k: int = 1, threshold: int | None = None) -> list[float]:
    """Train and return the losses; ``draw(m)`` gives the delays of microbatch m, or None if it is lost."""
    losses, versions = [], 0
    sums: list[list[tuple[Array, Array, int]]] = [[] for _ in stages]
    for m in range(microbatches):
        delays = draw(m)
        used = [max(0, versions - tau) for tau in delays or [0] * len(stages)]
        x, y = microbatch(m)
        hs = [x]
        for i, (stage, v) in enumerate(zip(stages, used, strict=True)):
            w = stage.forward[v]
            z = hs[-1] @ w[: WIDTH * WIDTH].reshape(WIDTH, WIDTH).T + w[WIDTH * WIDTH :]
            hs.append(z if i == len(stages) - 1 else np.tanh(z))
        losses.append(float(np.mean((hs[-1] - y) ** 2)))
        if delays is None:
            continue
        d = 2 * (hs[-1] - y) / y.size
        for i in reversed(range(len(stages))):
            if i < len(stages) - 1:
                d = d * (1 - hs[i + 1] ** 2)
            g = np.concatenate([(d.T @ hs[i]).ravel(), d.sum(0)])
            weight = 0.0 if threshold is not None and delays[i] > threshold else 1.0
            sums[i].append((weight * g, stages[i].forward[used[i]], delays[i]))
            d = d @ stages[i].backward(used[i])[: WIDTH * WIDTH].reshape(WIDTH, WIDTH)
        if len(sums[0]) == k:
            for stage, parts in zip(stages, sums, strict=True):
                stage.update(sum(g for g, _, _ in parts) / k, parts[-1][1], max(tau for _, _, tau in parts))
                parts.clear()
            versions += 1
    return losses


class Adam(Stage):
    beta1, beta2, eps, decay = 0.9, 0.999, 1e-8, 0.01

    def __init__(self, w: Array, tau: int, lr: float) -> None:
        super().__init__(w, tau, lr)
        self.m, self.v = np.zeros_like(w), np.zeros_like(w)

    def step(self, g: Array, late: Array, delay: int) -> Array:
        lr = self.lr * self.rate(delay)
        g = self.corrected(g, late)
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        self.u = lr * self.direction(g)
        return lr * self.decay * self.w + self.u

    def direction(self, g: Array) -> Array:
        return self.m / (1 - self.beta1**self.t) / self.root()

    def root(self) -> Array:
        return np.sqrt(self.v / (1 - self.beta2**self.t)) + self.eps

    def rate(self, delay: int) -> float:
        return 1.0

    def corrected(self, g: Array, late: Array) -> Array:
        return g


class NAdam(Adam):
    beta1 = 0.99
    product = 1.0

    def horizon(self) -> float:
        return 1.0

    def direction(self, g: Array) -> Array:
        mu = self.beta1 * (1 - 0.5 * 0.96 ** (self.t * 0.004))
        after = self.beta1 * (1 - 0.5 * 0.96 ** ((self.t + 1) * 0.004))
        self.product *= mu
        extra = self.beta1 ** (self.horizon() - 1)
        mixed = (1 - mu * extra) / (1 - self.product) * g + after * extra / (1 - self.product * after) * self.m
        return mixed / self.root()


class GrowingHorizon(NAdam):
    updates = 20

    def horizon(self) -> float:
        return 1 + max(0, self.tau - 1) * min((self.t - 1) / self.updates, 1)


class Nesterov(Stage):
    """Eq. 10 in its literal form: it keeps w and the previous w, and takes the gradient at w + d."""

    gamma = 0.99

    def __init__(self, w: Array, tau: int, lr: float) -> None:
        super().__init__(w, tau, lr)
        self.before = w

    def update(self, g: Array, late: Array, delay: int) -> None:
        d = self.gamma * (self.w - self.before)
        self.before, self.w = self.w, self.w + d - self.lr * (1 - self.gamma) * g
        self.forward.append(self.w + self.gamma * (self.w - self.before))


class NoStash(NAdam):
    """Eq. 13: the momentum depends on the stage's place, the rate on its delay; backward uses the newest weights."""

    updates = 20
    place, stages = 1, 1

    @property
    def beta1(self) -> float:  # type: ignore[override]
        return 0.9 + 0.09 * (self.stages - self.place) / self.stages

    def rate(self, delay: int) -> float:
        return max(1, delay) ** -(1 - min(self.t / self.updates, 1))

    def backward(self, version: int) -> Array:
        return self.w


class XPipe(Adam):
    def ahead(self) -> Array:
        return self.w - self.tau * self.lr * self.m / (1 - self.beta1**self.t) / self.root()


class LastDisplacement(Adam):
    def step(self, g: Array, late: Array, delay: int) -> Array:
        self.last = super().step(g, late, delay)
        return self.last

    def ahead(self) -> Array:
        return self.w - self.tau * self.last


class Momentum(Stage):
    gamma, decay = 0.9, 0.0

    def __init__(self, w: Array, tau: int, lr: float) -> None:
        super().__init__(w, tau, lr)
        self.m = np.zeros_like(w)

    def step(self, g: Array, late: Array, delay: int) -> Array:
        self.m = self.gamma * self.m + (1 - self.gamma) * self.corrected(g, late)
        return self.lr * self.decay * self.w + self.lr * self.m

    def corrected(self, g: Array, late: Array) -> Array:
        return g


class SpecTrain(Momentum):
    def ahead(self) -> Array:
        return self.w - self.tau * self.lr * self.m


class DanaZero(Momentum):
    decay = 1e-4

    def ahead(self) -> Array:
        w = self.w
        for k in range(1, self.tau + 1):
            w = w - self.lr * self.gamma**k * self.m
        return w


class DanaSlim(Momentum):
    """DANA-Slim: a step along the gradient includes the next step of the momentum."""

    decay = 1e-4

    def step(self, g: Array, late: Array, delay: int) -> Array:
        self.m = self.gamma * self.m + (1 - self.gamma) * g
        return self.lr * (self.decay * self.w + self.gamma * self.m + (1 - self.gamma) * g)


class DanaDc(DanaZero):
    def corrected(self, g: Array, late: Array) -> Array:
        return g + 2.0 * g**2 * (self.w - late)


class ErrorFeedback(Adam):
    """The buffer form: only the forward copy is kept; each update is applied twice and taken back once a step later."""

    decay = 0.0

    def update(self, g: Array, late: Array, delay: int) -> None:
        self.t += 1
        before = getattr(self, "u", np.zeros_like(g))
        self.step(g, late, delay)
        self.w = self.w - 2 * self.u + before if self.tau else self.w - self.u
        self.forward.append(self.w)


class ErrorFeedbackNAdam(ErrorFeedback, NAdam):
    decay = 0.0


class PipeMare(Adam):
    updates = 20

    def __init__(self, w: Array, tau: int, lr: float) -> None:
        super().__init__(w, tau, lr)
        self.delta = np.zeros_like(w)

    def rate(self, delay: int) -> float:
        return max(1, delay) ** -(1 - min(self.t / self.updates, 1))

    def update(self, g: Array, late: Array, delay: int) -> None:
        before = self.w
        super().update(g, late, delay)
        if self.tau:
            gamma = 0.135 ** (1 / self.tau)
            self.delta = gamma * self.delta + (1 - gamma) * (self.w - before)

    def backward(self, version: int) -> Array:
        return self.w - self.tau * self.delta


class Discounted(Adam):
    updates = 20

    def rate(self, delay: int) -> float:
        return max(1, delay) ** -(1 - min(self.t / self.updates, 1))


class StalenessAware(Adam):
    def rate(self, delay: int) -> float:
        return 1 / max(1, delay)


class DelayCompensated(Adam):
    def corrected(self, g: Array, late: Array) -> Array:
        return g + 0.04 * g**2 * (self.w - late)


class DiscountedCompensated(Discounted, DelayCompensated):
    pass


class AdaptivelyCompensated(Adam):
    square: Array | float = 0.0

    def corrected(self, g: Array, late: Array) -> Array:
        self.square = 0.95 * self.square + 0.05 * g**2
        return g + 2.0 / np.sqrt(self.square + 1e-7) * g**2 * (self.w - late)


class GapAware(Adam):
    mean: Array | float = 0.0

    def step(self, g: Array, late: Array, delay: int) -> Array:
        size = np.sqrt(self.mean / (1 - 0.999 ** (self.t - 1))) if self.t > 1 else np.zeros_like(g)
        gap = 1 + np.abs(self.w - late) / (size + 1e-8)
        super().step(g / gap, late, delay)
        self.mean = 0.999 * self.mean + 0.001 * self.u**2
        return self.lr * self.decay * self.w / gap + self.u


class Polynomial(Discounted):
    history = 5

    def __init__(self, w: Array, tau: int, lr: float) -> None:
        super().__init__(w, tau, lr)
        self.kept: list[Array] = []

    def step(self, g: Array, late: Array, delay: int) -> Array:
        self.kept = [*self.kept, g][-self.history :]
        if delay and len(self.kept) == self.history:
            g = self.guess(np.stack(self.kept), delay)
        return super().step(g, late, delay)

    def guess(self, kept: Array, delay: int) -> Array:
        coefficients = np.polynomial.polynomial.polyfit(np.arange(1 - self.history, 1), kept, 2)
        return np.polynomial.polynomial.polyval(float(delay), coefficients)


class Fourier(Polynomial):
    def guess(self, kept: Array, delay: int) -> Array:
        spectrum = np.fft.fft(kept, axis=0)
        at = self.history - 1 + delay
        phases = np.exp(2j * np.pi * np.fft.fftfreq(self.history) * at)
        return (spectrum * phases[:, None]).mean(0).real


class NewestBackward(Adam):
    beta2, decay = 0.95, 0.1

    def backward(self, version: int) -> Array:
        return self.w


class Rotated(Adam):
    """Basis rotation of W with both covariances; plain Adam for b."""

    matrix = slice(0, WIDTH * WIDTH)

    def __init__(self, w: Array, tau: int, lr: float) -> None:
        super().__init__(w, tau, lr)
        self.left, self.right = np.zeros((WIDTH, WIDTH)), np.zeros((WIDTH, WIDTH))

    def step(self, g: Array, late: Array, delay: int) -> Array:
        grad = g[self.matrix].reshape(WIDTH, WIDTH)
        self.left = self.beta2 * self.left + (1 - self.beta2) * grad @ grad.T
        self.right = self.beta2 * self.right + (1 - self.beta2) * grad.T @ grad
        second = self.v[self.matrix].reshape(WIDTH, WIDTH)
        if self.t == 1:
            self.p = np.linalg.eigh(self.left)[1][:, ::-1]
            self.q = np.linalg.eigh(self.right)[1][:, ::-1]
        elif self.t % 10 == 0:
            order = np.argsort(-np.diag(self.p.T @ self.left @ self.p))
            second, self.p = second[order], np.linalg.qr(self.left @ self.p[:, order])[0]
            order = np.argsort(-np.diag(self.q.T @ self.right @ self.q))
            second, self.q = second[:, order], np.linalg.qr(self.right @ self.q[:, order])[0]
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        rotated = g.copy()
        rotated[self.matrix] = (self.p.T @ grad @ self.q).ravel()
        self.v[self.matrix] = second.ravel()
        self.v = self.beta2 * self.v + (1 - self.beta2) * rotated**2
        turned = self.m.copy()
        turned[self.matrix] = (self.p.T @ self.m[self.matrix].reshape(WIDTH, WIDTH) @ self.q).ravel()
        turned = turned / (np.sqrt(self.v) + self.eps)
        turned[self.matrix] = (self.p @ turned[self.matrix].reshape(WIDTH, WIDTH) @ self.q.T).ravel()
        size = self.lr * np.sqrt(1 - self.beta2**self.t) / (1 - self.beta1**self.t)
        return self.lr * self.decay * self.w + size * turned


class RotatedMean(NAdam):
    """NAdam of W in the eigenbases of both covariances, which keeps the mean of the rotated gradients; NAdam for b."""

    beta2, covariance_every, refresh_every = 0.99, 4, 20
    matrix = slice(0, WIDTH * WIDTH)

    def __init__(self, w: Array, tau: int, lr: float) -> None:
        super().__init__(w, tau, lr)
        self.left, self.right = np.zeros((WIDTH, WIDTH)), np.zeros((WIDTH, WIDTH))

    def step(self, g: Array, late: Array, delay: int) -> Array:
        grad = g[self.matrix].reshape(WIDTH, WIDTH)
        if self.t == 1 or self.t % self.covariance_every == 0:
            beta = self.beta2**self.covariance_every
            self.left = beta * self.left + (1 - beta) * grad @ grad.T
            self.right = beta * self.right + (1 - beta) * grad.T @ grad
        first, second = (t[self.matrix].reshape(WIDTH, WIDTH) for t in (self.m, self.v))
        if self.t == 1:
            self.p = np.linalg.eigh(self.left)[1][:, ::-1]
            self.q = np.linalg.eigh(self.right)[1][:, ::-1]
        elif self.t % max(1, min(self.refresh_every, self.t // 10)) == 0:
            plain = self.p @ first @ self.q.T
            order = np.argsort(-np.diag(self.p.T @ self.left @ self.p))
            second, self.p = second[order], np.linalg.qr(self.left @ self.p[:, order])[0]
            order = np.argsort(-np.diag(self.q.T @ self.right @ self.q))
            second, self.q = second[:, order], np.linalg.qr(self.right @ self.q[:, order])[0]
            first = self.p.T @ plain @ self.q
        self.m[self.matrix], self.v[self.matrix] = first.ravel(), second.ravel()
        rotated = g.copy()
        rotated[self.matrix] = (self.p.T @ grad @ self.q).ravel()
        self.m = self.beta1 * self.m + (1 - self.beta1) * rotated
        self.v = self.beta2 * self.v + (1 - self.beta2) * rotated**2
        turned = self.direction(rotated)
        turned[self.matrix] = (self.p @ turned[self.matrix].reshape(WIDTH, WIDTH) @ self.q.T).ravel()
        return self.lr * self.decay * self.w + self.lr * turned


class RotatedAdamMean(RotatedMean):
    """The same with Adam."""

    beta1 = 0.9

    def direction(self, g: Array) -> Array:
        return Adam.direction(self, g)


class RotatedLight(Adam):
    """Basis rotation of only the columns of W, by the singular vectors of the momentum."""

    matrix = slice(0, WIDTH * WIDTH)

    def step(self, g: Array, late: Array, delay: int) -> Array:
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        momentum = self.m[self.matrix].reshape(WIDTH, WIDTH)
        if self.t == 1:
            self.q = np.linalg.svd(momentum)[2].T
        elif self.t % 10 == 0:
            order = np.argsort(-(momentum.T**2).sum(0))
            self.q = np.linalg.qr(momentum.T[:, order])[0]
        rotated, turned = g.copy(), self.m.copy()
        rotated[self.matrix] = (g[self.matrix].reshape(WIDTH, WIDTH) @ self.q).ravel()
        self.v = self.beta2 * self.v + (1 - self.beta2) * rotated**2
        turned[self.matrix] = (momentum @ self.q).ravel()
        turned = turned / (np.sqrt(self.v) + self.eps)
        turned[self.matrix] = (turned[self.matrix].reshape(WIDTH, WIDTH) @ self.q.T).ravel()
        size = self.lr * np.sqrt(1 - self.beta2**self.t) / (1 - self.beta1**self.t)
        return self.lr * self.decay * self.w + size * turned
