"""The step in plain torch, for any device and floating-point dtype. The other backends are tested against it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nesterov_pp.kernels.codes import (
    Coded,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
    group_count,
    joined,
    root,
    split,
)
from nesterov_pp.kernels.plan import StepClass, StepSlots, Tensors
from nesterov_pp.kernels.raw import has_memory, in_transform, is_subclass, is_writable, why_not_raw
from nesterov_pp.kernels.rounding import Noise, noise_of_codes
from nesterov_pp.kernels.scalars import Coefficients, Correction, CorrectionKind, Normaliser

_LOW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Late:
    """The inputs and outputs of a correction for one parameter (see ``Correction``).

    ``weights`` are the weights that the gradient was computed with, ``mean`` is the running mean of the correction, and
    ``ahead`` receives the predicted weights. ``mean`` and ``ahead`` are None if the correction has none.
    """

    kind: CorrectionKind
    scalars: Correction
    weights: Tensor
    mean: Tensor | None = None
    ahead: Tensor | None = None


def update(
    weight: Tensor,
    weight_out: Tensor,
    grad: Tensor,
    exp_avg: Tensor | Coded,
    exp_avg_sq: Tensor | Coded | None,
    c: Coefficients,
    *,
    normaliser: Normaliser | None = None,
    master: Tensor | None = None,
    residual: Tensor | None = None,
    max_exp_avg_sq: Tensor | None = None,
    noise: Noise | None = None,
    code_noise: Tensor | None = None,
    late: Late | None = None,
) -> None:
    """Update one parameter (see ``Coefficients``), in float32 for lower precisions; ``weight_out`` may be ``weight``.

    ``normaliser`` defaults to ``RMS`` with an ``exp_avg_sq`` and to ``NONE`` without. With a ``master``, the master is
    stepped and ``weight_out`` receives a copy; with a ``residual``, the weight of 24 bits that it completes is stepped.
    ``max_exp_avg_sq`` is AMSGrad's largest second moment, which replaces the second moment in the denominator.
    ``noise`` rounds bfloat16 stochastically, except copies and predictions; ``code_noise`` rounds the codes of a second
    moment (see ``encode_second``).
    """
    if normaliser is None:
        normaliser = Normaliser.NONE if exp_avg_sq is None else Normaliser.RMS
    source = weight if master is None else master
    dtype = torch.float32 if source.dtype in _LOW else source.dtype
    w = source.to(dtype) if residual is None else joined(source, residual)
    before = decode_first(exp_avg) if isinstance(exp_avg, Coded) else exp_avg.to(dtype)
    g, decay = _gradient(grad, w, c), _decay(w, c)
    mean = None
    if late is not None:
        mean = torch.zeros_like(w) if late.mean is None else late.mean.to(dtype)
        seen = w if master is None else w.to(grad.dtype).to(dtype)  # rounded as the gradient's weights are
        g, decay, mean = _correct(late, _difference(seen, late.weights.to(dtype)), mean, g, decay)
    m = _mean(before, g, c.beta1_complement)
    direction, momentum = c.c_grad * g + c.c_momentum * (before if normaliser == Normaliser.SIGN else m), m
    if exp_avg_sq is not None:
        v = decode_second(exp_avg_sq) if isinstance(exp_avg_sq, Coded) else exp_avg_sq.to(dtype)
        v = _mean_of_squares(v, g, c.beta2_complement)
        if not isinstance(exp_avg_sq, Coded):
            _store(exp_avg_sq, v, noise, 2)
            if exp_avg_sq.dtype == torch.float16:  # a value that overflows float16 is infinite in this step too
                v = torch.where(exp_avg_sq.isinf(), math.inf, v)
        if max_exp_avg_sq is not None:
            v = torch.maximum(v, max_exp_avg_sq.to(dtype))
            max_exp_avg_sq.copy_(v)
        roots = root(v * c.inv_bias2)
        denominator = roots + c.eps
        if isinstance(exp_avg_sq, Coded):
            roots, to_root = _laid_out_as(exp_avg_sq.codes, roots), 1.0 / math.sqrt(c.inv_bias2)
            _recode(exp_avg_sq, encode_second(roots, code_noise, to_root=to_root))
        direction, momentum = direction / denominator, m / denominator
    elif normaliser == Normaliser.SIGN:
        direction, momentum = c.inv_bias2 * _sign(direction), _sign(m)
    after = w - (decay + direction)
    if late is not None and mean is not None:
        ahead, mean = _predict(late, w, after, direction, momentum, mean)
        if late.mean is not None:
            _store(late.mean, mean, noise, 3)
        if late.ahead is not None:
            late.ahead.copy_(ahead)
    if isinstance(exp_avg, Coded):
        _recode(exp_avg, encode_first(_laid_out_as(exp_avg.codes, m)))
    else:
        _store(exp_avg, m, noise, 1)
    if residual is not None:
        rounded, rest = split(after)
        weight_out.copy_(rounded)
        residual.copy_(rest)
    elif master is None:
        _store(weight_out, after, noise, 0)
    else:
        master.copy_(after)
        weight_out.copy_(after)


def _correct(late: Late, apart: Tensor, a: Tensor, g: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient, the decay and the running mean, before the moments are updated.

    ``apart`` is the weights minus those that the gradient was computed with.
    """
    x = late.scalars
    if late.kind == CorrectionKind.DELAY_COMPENSATION:
        g = g + x.strength * g * (g * apart)
    elif late.kind == CorrectionKind.ADAPTIVE_DELAY_COMPENSATION:
        a = _mean_of_squares(a, g, x.mean_complement)
        g = g + x.strength / (a + x.eps).sqrt() * g * (g * apart)
    elif late.kind == CorrectionKind.GAP:
        gap = 1.0 + apart.abs() / ((a * x.inv_bias).sqrt() + x.eps)
        g, decay = g / gap, decay / gap
    return g, decay, a


def _predict(
    late: Late, w: Tensor, after: Tensor, direction: Tensor, momentum: Tensor, a: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the predicted weights and the running mean, after the update."""
    x, last = late.scalars, _difference(after, w)
    further = x.ahead_last * last - x.ahead_momentum * momentum
    if late.kind == CorrectionKind.GAP:
        a = _mean_of_squares(a, direction, x.mean_complement)
    elif late.kind == CorrectionKind.DISCREPANCY:
        a = _mean(a, last, x.mean_complement)
        further = further + x.ahead_mean * a
    return after + further, a


# The parts of the update, with the scalars rounded as in csrc/update.h, whose notes explain these forms.


def _gradient(grad: Tensor, w: Tensor, c: Coefficients) -> Tensor:
    g = c.grad_scale * grad.to(w.dtype)
    return g + c.l2 * w if _rounded(c.l2, w.dtype) != 0.0 else g


def _decay(w: Tensor, c: Coefficients) -> Tensor:
    return torch.where(w.isfinite(), c.decay * w, 0.0)


def _mean(m: Tensor, x: Tensor, complement: float) -> Tensor:
    if _rounded(complement, m.dtype) < 0.5:
        return m + complement * (x - m)
    return x - (1.0 - complement) * (x - m)


def _mean_of_squares(v: Tensor, x: Tensor, complement: float) -> Tensor:
    remaining = 1.0 - complement
    kept = _rounded(remaining * (1.0 - 2.0**-23), v.dtype)
    return kept * v + ((remaining - kept) * v + complement * x * x)


def _sign(x: Tensor) -> Tensor:
    """Return the sign of ``x``; NaN stays NaN, so that errors remain visible."""
    return torch.where(x.isnan(), x, x.sign())


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a == b, 0.0, a - b)


def _rounded(x: float, dtype: torch.dtype) -> float:
    return ctypes.c_float(x).value if dtype == torch.float32 else x


def widened(grad: Tensor) -> Tensor:
    """Return the gradient in a dtype in which its norm does not overflow.

    The norm of 5,000 float16 values of 1,000 is too large for float16.
    """
    return grad.to(torch.float32) if grad.dtype in _LOW else grad


def _store(to: Tensor, value: Tensor, noise: Noise | None, which: int) -> None:
    to.copy_(value if noise is None or to.dtype != torch.bfloat16 else noise.round(value, which))


def _recode(to: Coded, coded: Coded) -> None:
    to.codes.copy_(coded.codes)
    to.scales.copy_(coded.scales)


def _laid_out_as(codes: Tensor, values: Tensor) -> Tensor:
    """Return values in memory like codes, whose groups are counted in memory order."""
    return torch.empty_strided(codes.shape, codes.stride(), dtype=values.dtype, device=codes.device).copy_(values)


class ReferencePlan:
    """The plan of the reference backend: a loop over parameters."""

    on_device = False

    def __init__(self, tensors: Tensors, seed: int | None = None) -> None:
        self._tensors = tensors
        self._seed = seed
        self._slots = StepSlots()
        self._grads: list[Tensor | None] = []
        self._class_of: list[int] = []
        self.steps_run = 0

    def forget(self) -> None:
        self._grads = []

    def collect(self, slots: StepSlots) -> list[StepClass]:
        t, (_, source, target) = self._tensors, slots
        grads = [p.grad for p in t.slots[slots.grads]]
        classes: dict[StepClass, int] = {}
        class_of = []
        for i, grad in enumerate(grads):
            weight = t.slots[source][i]
            if grad is None and source == target:
                class_of.append(0)
                continue
            tensors: dict[str, Tensor | None] = {
                "next version": t.slots[target][i],
                "gradient": grad,
                "first moment": t.exp_avgs[i],
                "master weight": t.masters[i],
            }
            if t.exp_avg_sqs:
                tensors["second moment"] = t.exp_avg_sqs[i]
            if t.residuals:
                tensors["residual"] = t.residuals[i]
            if t.means:
                tensors["running mean"] = t.means[i]
            if t.shadows:
                tensors["shadow"] = t.shadows[i]
            for what, other in tensors.items():
                if other is not None:
                    _check_matches(t.names[i], what, weight, other)
            for what, other in tensors.items():
                if other is not None:
                    whose = t.names[i] if other is weight else f"the {what} of {t.names[i]}"
                    _check_memory(whose, other, written=what != "gradient")
            if grad is not None and why_not_raw(weight) is None:
                _check_plain(f"the gradient of {t.names[i]}", grad)
            coded = self._coded(i)
            if isinstance(coded[0], Coded):
                _check_coded(t.names[i], "first moment", weight, coded[0], torch.int8)
            if isinstance(coded[1], Coded):
                _check_coded(t.names[i], "second moment", weight, coded[1], torch.uint8)
            elif t.exp_avg_sqs:
                _check_alike(t.names[i], t.exp_avgs[i], t.exp_avg_sqs[i])
            if t.residuals and t.residuals[i] is not None and weight.dtype != torch.bfloat16:
                raise ValueError(f"{t.names[i]} is {weight.dtype}; residuals go with bfloat16 parameters")
            if grad is None:
                class_of.append(0)
                continue
            steps = _scalar(t.names[i], "step count", t.steps[i])
            mu_product = _scalar(t.names[i], "mu product", t.mu_products[i]) if t.mu_products else 1.0
            key = (t.groups[i], steps, mu_product)
            class_of.append(classes.setdefault(key, len(classes)))
        self._slots, self._grads, self._class_of = slots, grads, class_of
        self._rehearse()
        return list(classes)

    def _coded(self, i: int) -> tuple[Tensor | Coded, Tensor | Coded | None]:
        """Return the moments of parameter ``i``, with their scales if they are in eight bits."""
        t = self._tensors

        def moment(values: list[Tensor], scales: list[Tensor | None]) -> Tensor | Coded | None:
            of = scales[i] if scales else None
            return (values[i] if of is None else Coded(values[i], of)) if values else None

        first = moment(t.exp_avgs, t.exp_avg_scales)
        assert first is not None
        return first, moment(t.exp_avg_sqs, t.exp_avg_sq_scales)

    def _rehearse(self) -> None:
        """Step zero elements of tensors whose operators may refuse the step, so that they do so before any write."""
        t, (_, source, target) = self._tensors, self._slots
        for i, grad in enumerate(self._grads):
            if grad is None:
                continue
            tensors = [t.slots[source][i], t.slots[target][i], grad, t.exp_avgs[i], *t.exp_avg_sqs[i : i + 1]]
            if not in_transform() and all(why_not_raw(x) is None for x in tensors):
                continue
            if isinstance(self._coded(i)[0], Coded):
                raise ValueError(f"{t.names[i]} or its gradient is not a plain tensor; moments in eight bits need that")
            weight, weight_out, none, exp_avg, *exp_avg_sq = [x.detach().reshape(-1)[:0] for x in tensors]
            row = Coefficients(1.0, 0.0, 0.1, 0.1, 0.0, 0.1, 0.1, 1.0, 1.0)
            try:
                update(weight, weight_out, none, exp_avg, exp_avg_sq[0] if exp_avg_sq else None, row)
            except (TypeError, AssertionError, NotImplementedError) as error:
                what = f"{t.names[i]} cannot be stepped with its gradient and state"
                raise ValueError(f"{what}: {str(error).splitlines()[0]}") from error

    def gradient_norm(self) -> float:
        return float(torch.nn.utils.get_total_norm([widened(grad) for grad in self._grads if grad is not None]))

    def scale(self, scale: float, limit: float | None, grad_scale: Tensor | None) -> Tensor | None:
        raise NotImplementedError("the reference plan computes the scale of gradients on the host")

    def nonfinite_parameter(self) -> str:
        for name, grad in zip(self._tensors.names, self._grads, strict=True):
            if grad is not None and not bool(grad.isfinite().all()):
                return name
        return ""

    def apply_rows(self, rows: Tensor) -> None:
        raise NotImplementedError("apply_rows() needs a plan that is on_device; the reference plan is not")

    def apply(
        self, rows: Sequence[Coefficients], mu_products: Sequence[float], corrections: Sequence[Correction] = ()
    ) -> None:
        t, slots = self._tensors, self._slots
        for i, grad in enumerate(self._grads):
            weight, weight_out, shadow = t.slots[slots.source][i], t.slots[slots.target][i], None
            if grad is None:
                if weight_out is not weight:
                    weight_out.copy_(weight)
                continue
            k = self._class_of[i]
            origin = t.slots[slots.grads][i].detach()
            if t.shadows:
                shadow = t.shadows[i]
            if t.ring_predicts and shadow is not None:
                weight, weight_out, shadow = shadow, shadow, weight_out
            late = None
            if t.corrects:
                late = Late(t.kind, corrections[k], origin, t.means[i] if t.means else None, shadow)
            noise = None
            if self._seed is not None:
                noise = Noise(seed=self._seed, tensor=t.numbers[i], step=int(t.steps[i]) + 1)
            exp_avg, exp_avg_sq = self._coded(i)
            code_noise = None
            if isinstance(exp_avg_sq, Coded):
                step, number = int(t.steps[i]) + 1, t.numbers[i]
                code_noise = noise_of_codes(grad.numel(), grad.device, seed=t.code_seed, tensor=number, step=step)
            update(
                weight,
                weight_out,
                grad,
                exp_avg,
                exp_avg_sq,
                rows[k],
                normaliser=t.normaliser,
                master=t.masters[i],
                residual=t.residuals[i] if t.residuals else None,
                max_exp_avg_sq=t.max_exp_avg_sqs[i] if t.max_exp_avg_sqs else None,
                noise=noise,
                code_noise=code_noise,
                late=late,
            )
            t.steps[i].add_(1)
            if t.mu_products:
                t.mu_products[i].fill_(mu_products[k])
        self.steps_run += 1
        self._grads = []


def _check_matches(name: str, what: str, weight: Tensor, other: Tensor) -> None:
    for attribute in ("layout", "device", "shape"):
        expected, found = getattr(weight, attribute), getattr(other, attribute)
        if expected != found:
            raise ValueError(f"the {what} of {name} has {attribute} {found}, but the parameter has {expected}")
    if what in ("next version", "gradient", "shadow") and weight.dtype != other.dtype:
        raise ValueError(f"the {what} of {name} is {other.dtype}, but the parameter is {weight.dtype}")
    if what == "first moment" and weight.dtype in (torch.float64, torch.complex128) and other.dtype != weight.dtype:
        raise ValueError(f"the {what} of {name} is {other.dtype}, which does not go with a {weight.dtype} parameter")


def _check_alike(name: str, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    if exp_avg.dtype != exp_avg_sq.dtype:
        raise ValueError(f"the second moment of {name} is {exp_avg_sq.dtype}, but the first is {exp_avg.dtype}")


def _check_coded(name: str, what: str, weight: Tensor, coded: Coded, dtype: torch.dtype) -> None:
    codes, scales = coded
    if weight.is_complex() or weight.dtype == torch.float64 or codes.dtype != dtype:
        raise ValueError(f"the {what} of {name} is {codes.dtype}, which does not go with a {weight.dtype} parameter")
    count = group_count(codes.numel())
    if scales.dtype != torch.float16 or scales.shape != (count,) or not scales.is_contiguous():
        raise ValueError(f"the {what} of {name} needs {count} contiguous float16 scales, one for 32 elements")


def _check_plain(what: str, t: Tensor) -> None:
    if is_subclass(t):
        raise ValueError(f"{what} {why_not_raw(t)}")
    if torch._C._functorch.is_functorch_wrapped_tensor(t):
        raise ValueError(f"{what} {why_not_raw(t)}, but the parameter does not")


def _check_memory(what: str, t: Tensor, *, written: bool) -> None:
    if not has_memory(t):
        raise ValueError(f"{what} has a storage smaller than its shape (resized, or freed)")
    if not written:
        return
    if not is_writable(t):
        raise ValueError(
            f"{what} is an inference tensor, which only inference mode may write; make it outside or clone() it"
        )
    if t._is_zerotensor():
        raise ValueError(f"{what} {why_not_raw(t)}")
    if not t.is_floating_point() and t.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"{what} is {t.dtype}; it must be a floating-point dtype")
    extent = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride <= extent:
            raise ValueError(
                f"{what} overlaps itself (strides {t.stride()} for shape {tuple(t.shape)}), so a step "
                "cannot write it; give it memory of its own with clone()"
            )
        extent += stride * (size - 1)


def _scalar(name: str, what: str, t: Tensor) -> float:
    if t.numel() != 1 or t.device.type == "meta":
        raise ValueError(
            f"the {what} of {name} must be a tensor with one number, not a tensor of shape {tuple(t.shape)} "
            f"on {t.device}"
        )
    value = float(t.detach())
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(f"the {what} of {name} must be a finite number of at least 0, not {value:g}")
    return value
