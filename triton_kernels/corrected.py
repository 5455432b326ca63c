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
    _load,
    _narrowed,
    _quotient,
    _root,
    _span,
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
def _corrected_block(
    w, out, grad, late, ahead, m, v, mean, start, count, predicts,
    grad_scale, l2, beta1_complement, beta2_complement, decay, c_grad, c_momentum, inv_bias2, eps,
    strength, mean_complement, inv_bias, mean_eps, ahead_last, ahead_momentum, ahead_mean,
    W: tl.constexpr, M: tl.constexpr, T: tl.constexpr, KIND: tl.constexpr,
    ADAPTIVE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    mask = start + lanes < count
    weight = _load(w + start, lanes, mask, FULL).to(T)
    g = grad_scale * _load(grad + start, lanes, mask, FULL).to(T) + l2 * weight
    decayed = decay * weight
    m1 = _load(m + start, lanes, mask, FULL).to(T)
    a = tl.zeros([BLOCK], T)
    if KIND >= _ADAPTIVE_COMPENSATION:
        a = _load(mean + start, lanes, mask, FULL).to(T)
    if (KIND != 0) and (KIND != _DISCREPANCY):
        apart = weight - _load(late + start, lanes, mask, FULL).to(T)
        if KIND == _COMPENSATION:
            g = g + strength * g * g * apart
        if KIND == _ADAPTIVE_COMPENSATION:
            a = a + mean_complement * (g * g - a)
            g = g + _quotient(strength, _root(a + mean_eps)) * g * g * apart
        if KIND == _GAP:
            gap = 1.0 + _quotient(tl.abs(apart), _root(a * inv_bias) + mean_eps)
            g = _quotient(g, gap)
            decayed = _quotient(decayed, gap)
    m1 = m1 + beta1_complement * (g - m1)
    direction = c_grad * g + c_momentum * m1
    momentum = m1
    if ADAPTIVE:
        v1 = _load(v + start, lanes, mask, FULL).to(T)
        v1 = v1 + beta2_complement * (g * g - v1)
        denominator = _root(v1 * inv_bias2) + eps
        direction = _quotient(direction, denominator)
        momentum = _quotient(m1, denominator)
        _store(v + start, lanes, _narrowed(v1, lanes, M, False), mask, FULL)
    new = weight - (decayed + direction)
    if KIND == _GAP:
        a = a + mean_complement * (direction * direction - a)
    if KIND == _DISCREPANCY:
        a = a + mean_complement * ((new - weight) - a)
    predicted = new + (ahead_last * (new - weight) - ahead_momentum * momentum + ahead_mean * a)
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
    g0, l2, b1, b2, decay, c_grad, c_momentum, inv_bias2, eps = _coefficients(r, factor, T, SCALED)
    strength = tl.load(r + 10).to(T)
    mean_complement = tl.load(r + 11).to(T)
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
                g0, l2, b1, b2, decay, c_grad, c_momentum, inv_bias2, eps,
                strength, mean_complement, inv_bias, mean_eps, ahead_last, ahead_momentum, ahead_mean,
                W, M, T, KIND, ADAPTIVE, BLOCK, True,
            )  # fmt: skip
            start += BLOCK
    while start < count:
        _corrected_block(
            w, out, grad, late, ahead, m, v, mean, start, count, predicts,
            g0, l2, b1, b2, decay, c_grad, c_momentum, inv_bias2, eps,
            strength, mean_complement, inv_bias, mean_eps, ahead_last, ahead_momentum, ahead_mean,
            W, M, T, KIND, ADAPTIVE, BLOCK, False,
        )  # fmt: skip
        start += BLOCK
