"""The pass with a correction of late gradients in it, as a Triton kernel: what ``csrc/device/corrected.h`` does."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import (
    _BESIDE,
    _EXP_AVG,
    _EXP_AVG_SQ,
    _GRAD,
    _MASTER,
    _MEAN,
    _SLOTS,
    _carry,
    _coefficients,
    _decay,
    _load,
    _mean,
    _mean_scalars,
    _narrowed,
    _quotient,
    _root,
    _span,
    _square_mean,
    _square_mean_scalars,
    _store,
    _word,
)

# ``nesterov_pp.kernels.Kind``
_COMPENSATION = tl.constexpr(1)
_ADAPTIVE_COMPENSATION = tl.constexpr(2)
_GAP = tl.constexpr(3)
_DISCREPANCY = tl.constexpr(4)
_ROW_WORDS = tl.constexpr(17)


@triton.jit
def _difference(a, b):
    """Infinite weights are no distance apart."""
    return tl.where(a == b, 0.0, a - b)


@triton.jit
def _corrected_block(
    w, out, grad, late, ahead, m, v, mean, start, count, predicts,
    grad_scale, l2, decay, c_grad, c_momentum, inv_bias2, eps, weight1, is_small, kept2, rest2, weight2,
    strength, inv_bias, mean_eps, ahead_last, ahead_momentum, ahead_mean,
    mean_weight, mean_is_small, mean_kept, mean_rest, mean_complement,
    W: tl.constexpr, M: tl.constexpr, T: tl.constexpr, KIND: tl.constexpr,
    ADAPTIVE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    mask = start + lanes < count
    weight = _load(w + start, lanes, mask, FULL).to(T)
    g = grad_scale * _load(grad + start, lanes, mask, FULL).to(T)
    # A choice for the whole block, which takes fewer registers here; in _step_block one by element does.
    if l2 != 0:
        g = g + l2 * weight
    decayed = _decay(weight, decay)
    m1 = _load(m + start, lanes, mask, FULL).to(T)
    a = tl.zeros([BLOCK], T)
    if KIND >= _ADAPTIVE_COMPENSATION:
        a = _load(mean + start, lanes, mask, FULL).to(T)
    if (KIND != 0) and (KIND != _DISCREPANCY):
        apart = _difference(weight, _load(late + start, lanes, mask, FULL).to(T))
        if KIND == _COMPENSATION:
            g = g + strength * g * (g * apart)
        if KIND == _ADAPTIVE_COMPENSATION:
            a = _square_mean(a, g, mean_kept, mean_rest, mean_complement)
            g = g + _quotient(strength, _root(a + mean_eps)) * g * (g * apart)
        if KIND == _GAP:
            gap = 1.0 + _quotient(tl.abs(apart), _root(a * inv_bias) + mean_eps)
            g = _quotient(g, gap)
            decayed = _quotient(decayed, gap)
    m1 = _mean(m1, g, weight1, is_small)
    direction = c_grad * g + c_momentum * m1
    momentum = m1
    if ADAPTIVE:
        v1 = _square_mean(_load(v + start, lanes, mask, FULL).to(T), g, kept2, rest2, weight2)
        denominator = _root(v1 * inv_bias2) + eps
        direction = _quotient(direction, denominator)
        momentum = _quotient(m1, denominator)
        _store(v + start, lanes, _narrowed(v1, lanes, M, False), mask, FULL)
    new = weight - (decayed + direction)
    last = _difference(new, weight)
    further = ahead_last * last - ahead_momentum * momentum
    if KIND == _GAP:
        a = _square_mean(a, direction, mean_kept, mean_rest, mean_complement)
    if KIND == _DISCREPANCY:
        a = _mean(a, last, mean_weight, mean_is_small)
        further = further + ahead_mean * a
    predicted = new + further
    _store(m + start, lanes, _narrowed(m1, lanes, M, False), mask, FULL)
    if KIND >= _ADAPTIVE_COMPENSATION:
        _store(mean + start, lanes, _narrowed(a, lanes, M, False), mask, FULL)
    if predicts:
        _store(ahead + start, lanes, _narrowed(predicted, lanes, W, False), mask, FULL)
    _store(out + start, lanes, _narrowed(new, lanes, W, False), mask, FULL)


@triton.jit(do_not_specialize=["tensors", "source", "target", "origin"])
def corrected_kernel(
    table, chunks, rows, factor, tensors, source, target, origin,
    W: tl.constexpr, M: tl.constexpr, T: tl.constexpr, KIND: tl.constexpr,
    ADAPTIVE: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk of the step. ``rows``: float64, 17 words each; ``origin``: the slot that the gradients are of; KIND: of
    ``nesterov_pp.kernels.Kind``. The rest as for ``step_kernel``."""
    tensor, begin, count, row, aligned = _span(table, chunks, tensors)
    old = _word(table, tensors, _SLOTS + source, tensor)
    new = _word(table, tensors, _SLOTS + target, tensor)
    if row < 0:
        if source != target:
            _carry(old.to(tl.pointer_type(W)) + begin, new.to(tl.pointer_type(W)) + begin, count, BLOCK)
        return
    r = rows + row * _ROW_WORDS
    if tl.load(r + 9) == 0:
        return
    stepped = _word(table, tensors, _MASTER, tensor)
    beside = _word(table, tensors, _BESIDE, tensor)
    if stepped != 0:
        beside = new
        old = stepped
        new = stepped
    predicts = beside != 0
    w = old.to(tl.pointer_type(W)) + begin
    out = new.to(tl.pointer_type(W)) + begin
    ahead = beside.to(tl.pointer_type(W)) + begin
    grad = _word(table, tensors, _GRAD, tensor).to(tl.pointer_type(W)) + begin
    late = _word(table, tensors, _SLOTS + origin, tensor).to(tl.pointer_type(W)) + begin
    m = _word(table, tensors, _EXP_AVG, tensor).to(tl.pointer_type(M)) + begin
    v = _word(table, tensors, _EXP_AVG_SQ, tensor).to(tl.pointer_type(M)) + begin
    mean = _word(table, tensors, _MEAN, tensor).to(tl.pointer_type(M)) + begin
    g0, l2, decay, c_grad, c_momentum, inv_bias2, eps, w1, small, k2, r2, w2 = _coefficients(r, factor, T, SCALED)
    strength = tl.load(r + 10).to(T)
    mean_weight, mean_small = _mean_scalars(tl.load(r + 11), T)
    mean_kept, mean_rest, mean_complement = _square_mean_scalars(tl.load(r + 11), T)
    inv_bias = tl.load(r + 12).to(T)
    mean_eps = tl.load(r + 13).to(T)
    ahead_last = tl.load(r + 14).to(T)
    ahead_momentum = tl.load(r + 15).to(T)
    ahead_mean = tl.load(r + 16).to(T)
    start = 0
    if aligned != 0:
        while start + BLOCK <= count:
            _corrected_block(
                w, out, grad, late, ahead, m, v, mean, start, count, predicts,
                g0, l2, decay, c_grad, c_momentum, inv_bias2, eps, w1, small, k2, r2, w2,
                strength, inv_bias, mean_eps, ahead_last, ahead_momentum, ahead_mean,
                mean_weight, mean_small, mean_kept, mean_rest, mean_complement,
                W, M, T, KIND, ADAPTIVE, BLOCK, True,
            )  # fmt: skip
            start += BLOCK
    while start < count:
        _corrected_block(
            w, out, grad, late, ahead, m, v, mean, start, count, predicts,
            g0, l2, decay, c_grad, c_momentum, inv_bias2, eps, w1, small, k2, r2, w2,
            strength, inv_bias, mean_eps, ahead_last, ahead_momentum, ahead_mean,
            mean_weight, mean_small, mean_kept, mean_rest, mean_complement,
            W, M, T, KIND, ADAPTIVE, BLOCK, False,
        )  # fmt: skip
        start += BLOCK
