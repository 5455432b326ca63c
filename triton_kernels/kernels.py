"""The passes over many tensors as Triton kernels.

They read the table of ``csrc/device/table.h`` and compute the same as ``csrc/device/pass.h``, with one program per
chunk. Numbers that change from step to step are never compile-time constants, so no step recompiles a kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import GROUP, encoded_first, encoded_second, first_of, joined, residual_of, scales, second_of
from .elements import (
    exact_quotient,
    exact_root,
    load,
    narrowed,
    nearest_quotient,
    nearest_root,
    quiet,
    rounded,
    store,
    widened,
)
from .estimates import are_sure
from .noise import random_words, words_of_groups

CHUNK = 16384
"""The number of elements of one tensor in an entry of ``chunks``: ``device::kChunk``."""

PARTS = 4
"""The number of programs that step one chunk. Each is one warp, which can agree on a branch without a barrier."""

# Columns of the table, which have one 64-bit word per tensor.
_ROW = tl.constexpr(0)
_GRAD = tl.constexpr(1)
_ALIGNED = tl.constexpr(2)
_NUMEL = tl.constexpr(3)
_NUMBER = tl.constexpr(4)
_MASTER = tl.constexpr(5)
_EXP_AVG = tl.constexpr(6)
_EXP_AVG_SQ = tl.constexpr(7)
_MEAN = tl.constexpr(8)
_SHADOW = tl.constexpr(9)
_EXP_AVG_SCALE = tl.constexpr(10)
_EXP_AVG_SQ_SCALE = tl.constexpr(11)
_RESIDUAL = tl.constexpr(12)
_SLOTS = tl.constexpr(13)
_STEP = tl.constexpr(9)  # word of a row: the number of the step; the scalars of a correction follow
_ROW_WORDS = tl.constexpr(10)
_CORRECTED_ROW_WORDS = tl.constexpr(17)
_CHUNK = tl.constexpr(CHUNK)
_SPAN_GROUPS = tl.constexpr(32)  # for which a warp draws random words at once, each thread its own
_PARTS = tl.constexpr(PARTS)
_ALMOST_ONE = tl.constexpr(1.0 - 2.0**-23)

# ``nesterov_pp.kernels.Normaliser`` and ``CorrectionKind``
_RMS = tl.constexpr(1)
_SIGN = tl.constexpr(2)
_COMPENSATION = tl.constexpr(1)
_ADAPTIVE_COMPENSATION = tl.constexpr(2)
_GAP = tl.constexpr(3)
_DISCREPANCY = tl.constexpr(4)


@triton.jit
def _word(table, tensors, column, tensor):
    return tl.load(table + column * tensors + tensor)


@triton.jit
def _span(table, chunks, tensors, PARTS: tl.constexpr):
    """Return this program's part of a chunk (tensor, first element, number of elements, which may be negative) and the
    tensor's row and alignment."""
    size: tl.constexpr = _CHUNK // PARTS
    word = tl.load(chunks + tl.program_id(0))
    tensor = word >> 32
    begin = (word & 0xFFFFFFFF) * _CHUNK + tl.program_id(1) * size
    count = tl.minimum(_word(table, tensors, _NUMEL, tensor) - begin, size).to(tl.int32)
    return tensor, begin, count, _word(table, tensors, _ROW, tensor), _word(table, tensors, _ALIGNED, tensor)


# The forms of the two means, and why nothing is multiplied by a 0, are explained in csrc/update.h.


@triton.jit
def _mean_scalars(complement, T: tl.constexpr):
    """Return the weight of ``_mean``, negative if the mean starts from ``x``, and whether it starts from ``m``."""
    is_small = complement.to(T) < 0.5
    return tl.where(is_small, complement, complement - 1.0).to(T), is_small


@triton.jit
def _mean(m, x, weight, is_small):
    return tl.where(is_small, m, x) + weight * (x - m)


@triton.jit
def _usual_mean(m, x, weight):
    return m + weight * (x - m)


@triton.jit
def _square_mean_scalars(complement, T: tl.constexpr):
    remaining = 1.0 - complement
    kept = (remaining * _ALMOST_ONE).to(T)
    return kept, (remaining - kept.to(tl.float64)).to(T), complement.to(T)


@triton.jit
def _square_mean(v, x, kept, rest, complement):
    return kept * v + (rest * v + complement * x * x)


@triton.jit
def _decay(weight, decay):
    return tl.where(tl.abs(weight) < float("inf"), decay * weight, 0.0)


@triton.jit
def _coefficients(r, factor, T: tl.constexpr, SCALED: tl.constexpr):
    """Load the scalars of a row in the dtype to compute in: grad_scale, l2, decay, c_grad, c_momentum, inv_bias2, eps,
    and those of the two means."""
    grad_scale = tl.load(r)
    if SCALED:
        grad_scale = grad_scale * tl.load(factor)
    weight1, is_small = _mean_scalars(tl.load(r + 2), T)
    kept2, rest2, weight2 = _square_mean_scalars(tl.load(r + 3), T)
    return (
        grad_scale.to(T), tl.load(r + 1).to(T), tl.load(r + 4).to(T), tl.load(r + 5).to(T), tl.load(r + 6).to(T),
        tl.load(r + 7).to(T), tl.load(r + 8).to(T), weight1, is_small, kept2, rest2, weight2,
    )  # fmt: skip


@triton.jit
def _carry(old, new, count, BLOCK: tl.constexpr):
    """Copy a chunk of a weight that received no gradient into the next slot."""
    lanes = tl.arange(0, BLOCK)
    start = 0
    while start < count:
        mask = start + lanes < count
        tl.store(new + start + lanes, tl.load(old + start + lanes, mask=mask), mask=mask)
        start += BLOCK


@triton.jit
def _correction(r, T: tl.constexpr):
    """Load the scalars of a correction: strength, inv_bias, eps, those of the prediction and those of the two means."""
    weight, is_small = _mean_scalars(tl.load(r + 1), T)
    kept, rest, complement = _square_mean_scalars(tl.load(r + 1), T)
    return (
        tl.load(r).to(T), tl.load(r + 2).to(T), tl.load(r + 3).to(T), tl.load(r + 4).to(T), tl.load(r + 5).to(T),
        tl.load(r + 6).to(T), weight, is_small, kept, rest, complement,
    )  # fmt: skip


@triton.jit
def _difference(a, b):
    """Return ``a - b``, and 0 for infinite weights of the same sign."""
    return tl.where(a == b, 0.0, a - b)


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def _step_block(
    pointers, begin, start, count, noise, words, to_root, coefficients, correction, predicts,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, T: tl.constexpr, SPLIT: tl.constexpr, NORMALISER: tl.constexpr,
    CORRECTS: tl.constexpr, KIND: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
    USUAL: tl.constexpr,
):  # fmt: skip
    w, out, grad, late, m, v, mean, copy, ahead, m_scale, v_scale, residual = pointers
    grad_scale, l2, decay, c_grad, c_momentum, inv_bias2, eps, weight1, is_small, kept2, rest2, weight2 = coefficients
    EXACT: tl.constexpr = CORRECTS or (NORMALISER != _RMS) or (tl.float64 == T) or (not FULL)
    CODED: tl.constexpr = tl.int8 == M
    lanes = tl.arange(0, BLOCK)
    mask = start + lanes < count
    weight = widened(load(w + start, lanes, mask, FULL), T)
    if SPLIT:
        weight = joined(weight, load(residual + start, lanes, mask, FULL))
    g = grad_scale * widened(load(grad + start, lanes, mask, FULL), T)
    if not USUAL:
        g = tl.where(l2 != 0.0, g + l2 * weight, g)
    if EXACT:
        decayed = _decay(weight, decay)
    if CORRECTS:
        (
            strength, inv_bias, mean_eps, ahead_last, ahead_momentum, ahead_mean,
            mean_weight, mean_is_small, mean_kept, mean_rest, mean_complement,
        ) = correction  # fmt: skip
        a = tl.zeros([BLOCK], T)
        if KIND >= _ADAPTIVE_COMPENSATION:
            a = widened(load(mean + start, lanes, mask, FULL), T)
        if (KIND != 0) and (KIND != _DISCREPANCY):
            seen = weight
            if W != G:  # in the gradient's dtype: the difference is 0 for a master that was not stepped since
                seen = narrowed(weight, G).to(T)
            apart = _difference(seen, widened(load(late + start, lanes, mask, FULL), T))
            if KIND == _COMPENSATION:
                g = g + strength * g * (g * apart)
            if KIND == _ADAPTIVE_COMPENSATION:
                a = _square_mean(a, g, mean_kept, mean_rest, mean_complement)
                g = g + exact_quotient(strength, exact_root(a + mean_eps)) * g * (g * apart)
            if KIND == _GAP:
                gap = 1.0 + exact_quotient(tl.abs(apart), exact_root(a * inv_bias) + mean_eps)
                g = exact_quotient(g, gap)
                decayed = exact_quotient(decayed, gap)
    before = load(m + start, lanes, mask, FULL)
    before = first_of(before, scales(m_scale, start, count, BLOCK, FULL)) if CODED else widened(before, T)
    m1 = _usual_mean(before, g, weight1) if USUAL else _mean(before, g, weight1, is_small)
    direction = c_grad * g + c_momentum * (before if NORMALISER == _SIGN else m1)
    momentum = m1
    if STOCHASTIC:
        key0, key1, number, step = noise
        first, second = random_words(key0, key1, number, step, begin, start, BLOCK, tl.bfloat16 == M)
    else:
        first = tl.zeros([BLOCK], tl.uint32)
        second = first
    if NORMALISER == _RMS:
        v1 = load(v + start, lanes, mask, FULL)
        v1 = second_of(v1, scales(v_scale, start, count, BLOCK, FULL)) if CODED else widened(v1, T)
        v1 = _square_mean(v1, g, kept2, rest2, weight2)
        if tl.float16 == M:  # a value that overflows float16 is infinite in this step too
            v1 = tl.where(v1 >= 65520.0, float("inf"), v1)
        square = v1 * inv_bias2
        if CODED:
            of_groups = tl.gather(words, (start // GROUP) % _SPAN_GROUPS + tl.arange(0, BLOCK // GROUP), 0)
        if EXACT:
            root = exact_root(square)
            denominator = root + eps
            direction = exact_quotient(direction, denominator)
            if CORRECTS:
                momentum = exact_quotient(m1, denominator)
        else:  # an infinite weight is not sure, so its decay has no case of its own
            root = nearest_root(square)
            quotient = nearest_quotient(direction, root + eps)
            new = weight - (decay * weight + quotient)
            if are_sure(square, quotient, new):
                if CODED:
                    m_codes = encoded_first(m1, m_scale, start, count, BLOCK, FULL, True)
                    v_codes = encoded_second(root, to_root, of_groups, v_scale, start, count, BLOCK, FULL, True)
                if SPLIT:
                    stepped, rest = residual_of(new, True)
            else:
                root = exact_root(square)
                new = weight - (_decay(weight, decay) + exact_quotient(direction, root + eps))
                if STOCHASTIC:  # here alone, since a sure step has no NaN
                    m1 = quiet(m1)
                    v1 = quiet(v1)
                    new = quiet(new)
                if CODED:
                    m_codes = encoded_first(m1, m_scale, start, count, BLOCK, FULL, False)
                    v_codes = encoded_second(root, to_root, of_groups, v_scale, start, count, BLOCK, FULL, False)
                if SPLIT:
                    stepped, rest = residual_of(new, False)
        if CODED and EXACT:
            v_codes = encoded_second(root, to_root, of_groups, v_scale, start, count, BLOCK, FULL, False)
        store(v + start, lanes, v_codes if CODED else rounded(v1, second, False, M, STOCHASTIC, EXACT), mask, FULL)
    if NORMALISER == _SIGN:
        direction = inv_bias2 * _sign(direction)
        momentum = _sign(m1)
    if EXACT:
        new = weight - (decayed + direction)
    if CORRECTS:
        last = _difference(new, weight)
        further = ahead_last * last - ahead_momentum * momentum
        if KIND == _GAP:
            a = _square_mean(a, direction, mean_kept, mean_rest, mean_complement)
        if KIND == _DISCREPANCY:
            a = _mean(a, last, mean_weight, mean_is_small)
            further = further + ahead_mean * a
        predicted = new + further
        if KIND >= _ADAPTIVE_COMPENSATION:
            store(mean + start, lanes, rounded(a, second, True, M, STOCHASTIC, EXACT), mask, FULL)
        if predicts:
            store(ahead + start, lanes, narrowed(predicted, G), mask, FULL)
    if CODED and EXACT:
        m_codes = encoded_first(m1, m_scale, start, count, BLOCK, FULL, False)
    store(m + start, lanes, m_codes if CODED else rounded(m1, first, True, M, STOCHASTIC, EXACT), mask, FULL)
    if SPLIT:
        if EXACT:
            stepped, rest = residual_of(new, False)
        store(residual + start, lanes, rest, mask, FULL)
    else:
        stepped = rounded(new, first, False, W, STOCHASTIC, EXACT)
    store(out + start, lanes, stepped, mask, FULL)
    if W != G:
        store(copy + start, lanes, narrowed(new, G), mask, FULL)


@triton.jit
def _drawn(words, noise, begin, start):
    """Return random words for the groups of several blocks: new ones if ``start`` is the first of these blocks."""
    key0, key1, number, step = noise
    if (start // GROUP) % _SPAN_GROUPS == 0:
        words = words_of_groups(key0, key1, number, step, (begin + start) // GROUP, _SPAN_GROUPS)
    return words


@triton.jit
def _step_blocks(
    aligned, pointers, begin, count, noise, to_root, coefficients, correction, predicts,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, T: tl.constexpr, SPLIT: tl.constexpr, NORMALISER: tl.constexpr,
    CORRECTS: tl.constexpr, KIND: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, USUAL: tl.constexpr,
):  # fmt: skip
    DRAWS: tl.constexpr = (tl.int8 == M) and (NORMALISER == _RMS)
    words = tl.zeros([_SPAN_GROUPS], tl.uint32)
    start = 0
    if aligned != 0:
        while start + BLOCK <= count:
            if DRAWS:
                words = _drawn(words, noise, begin, start)
            _step_block(
                pointers, begin, start, count, noise, words, to_root, coefficients, correction, predicts,
                W, G, M, T, SPLIT, NORMALISER, CORRECTS, KIND, STOCHASTIC, BLOCK, True, USUAL,
            )  # fmt: skip
            start += BLOCK
    while start < count:
        if DRAWS:
            words = _drawn(words, noise, begin, start)
        _step_block(
            pointers, begin, start, count, noise, words, to_root, coefficients, correction, predicts,
            W, G, M, T, SPLIT, NORMALISER, CORRECTS, KIND, STOCHASTIC, BLOCK, False, USUAL,
        )  # fmt: skip
        start += BLOCK


@triton.jit
def _at(table, tensors, column, tensor, begin, S: tl.constexpr):
    return _word(table, tensors, column, tensor).to(tl.pointer_type(S)) + begin


@triton.jit(do_not_specialize=["tensors", "grads", "source", "target", "key0", "key1"])
def step_kernel(
    table, chunks, rows, factor, tensors, grads, source, target, key0, key1,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, T: tl.constexpr, SPLIT: tl.constexpr, NORMALISER: tl.constexpr,
    CORRECTS: tl.constexpr, KIND: tl.constexpr, RING_PREDICTS: tl.constexpr, STOCHASTIC: tl.constexpr,
    SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Step a part of one chunk: the second coordinate of the program tells which of PARTS.

    ``table`` and ``chunks`` are int64. ``rows`` is float64 with 10 words per row, 17 with CORRECTS. ``factor`` is
    float64 and read only if SCALED. ``grads``, ``source`` and ``target`` are ring slots. ``key0`` and ``key1`` are the
    halves of the seed. W, G and M are the dtypes of the weights computed with, of the gradients and of the moments,
    int8 for moments in eight bits; with SPLIT, residuals complete bfloat16 weights to 24 bits. T is the dtype to
    compute in. NORMALISER and KIND are values of ``Normaliser`` and ``CorrectionKind`` in ``nesterov_pp.kernels``.
    """
    tensor, begin, count, row, aligned = _span(table, chunks, tensors, _PARTS)
    if count <= 0:
        return
    if row < 0:
        if source != target:
            old = _at(table, tensors, _SLOTS + source, tensor, begin, G)
            _carry(old, _at(table, tensors, _SLOTS + target, tensor, begin, G), count, BLOCK)
        return
    r = rows + row * (_CORRECTED_ROW_WORDS if CORRECTS else _ROW_WORDS)
    step = tl.load(r + _STEP).to(tl.uint32)
    if step == 0:
        return
    # The stepped weights are in the ring and the predicted weights in the shadow, or the other way round.
    old = _SLOTS + source
    new = _SLOTS + target
    predicted = tl.full((), _SHADOW, tl.int32)
    if RING_PREDICTS:
        predicted = new
        old = tl.full((), _SHADOW, tl.int32)
        new = old
    predicts = _word(table, tensors, predicted, tensor) != 0
    ahead = _at(table, tensors, predicted, tensor, begin, G)
    copy = _at(table, tensors, new, tensor, begin, G)
    if W != G:
        w = _at(table, tensors, _MASTER, tensor, begin, W)
        out = w
    else:
        w = _at(table, tensors, old, tensor, begin, W)
        out = copy
    pointers = (
        w,
        out,
        _at(table, tensors, _GRAD, tensor, begin, G),
        _at(table, tensors, _SLOTS + grads, tensor, begin, G),
        _at(table, tensors, _EXP_AVG, tensor, begin, M),
        _at(table, tensors, _EXP_AVG_SQ, tensor, begin, tl.uint8 if tl.int8 == M else M),
        _at(table, tensors, _MEAN, tensor, begin, M),
        copy,
        ahead,
        _at(table, tensors, _EXP_AVG_SCALE, tensor, begin // GROUP, tl.float16),
        _at(table, tensors, _EXP_AVG_SQ_SCALE, tensor, begin // GROUP, tl.float16),
        _at(table, tensors, _RESIDUAL, tensor, begin, tl.int8),
    )
    number = _word(table, tensors, _NUMBER, tensor).to(tl.uint32)
    noise = (key0.to(tl.uint32), key1.to(tl.uint32), number, step)
    coefficients = _coefficients(r, factor, T, SCALED)
    to_root = coefficients[5]
    if tl.int8 == M:
        to_root = (1.0 / tl.sqrt(tl.load(r + 7))).to(T)
    correction = coefficients
    if CORRECTS:
        correction = _correction(r + _STEP + 1, T)
    l2, is_small = coefficients[1], coefficients[8]
    if (l2 == 0) & is_small:
        _step_blocks(
            aligned, pointers, begin, count, noise, to_root, coefficients, correction, predicts,
            W, G, M, T, SPLIT, NORMALISER, CORRECTS, KIND, STOCHASTIC, BLOCK, True,
        )  # fmt: skip
    else:
        _step_blocks(
            aligned, pointers, begin, count, noise, to_root, coefficients, correction, predicts,
            W, G, M, T, SPLIT, NORMALISER, CORRECTS, KIND, STOCHASTIC, BLOCK, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tensors"])
def squares_kernel(table, chunks, partials, tensors, G: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """Write the sum of squares of a chunk's gradients, 0 for a tensor without one, to ``partials`` (float64)."""
    tensor, begin, count, row, aligned = _span(table, chunks, tensors, 1)
    if row < 0:
        count = 0
    grad = _word(table, tensors, _GRAD, tensor).to(tl.pointer_type(G)) + begin
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], T)
    start = 0
    if aligned != 0:
        while start + BLOCK <= count:
            x = widened(load(grad + start, lanes, lanes < BLOCK, True), T)
            sums += x * x
            start += BLOCK
    while start < count:
        x = widened(load(grad + start, lanes, start + lanes < count, False), T)
        sums += x * x
        start += BLOCK
    tl.store(partials + tl.program_id(0), tl.sum(sums.to(tl.float64)))


@triton.jit(do_not_specialize=["count"])
def scaling_kernel(partials, count, scale, limit, grad_scale, result, UNSCALES: tl.constexpr, BLOCK: tl.constexpr):
    """Write the norm times ``scale`` over the loss scale, and the factor of ``device::factor_of``, to ``result``."""
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    start = 0
    while start < count:
        sums += tl.load(partials + start + lanes, mask=start + lanes < count, other=0.0)
        start += BLOCK
    loss_scale = tl.full((), 1.0, tl.float64)
    if UNSCALES:
        loss_scale = tl.load(grad_scale).to(tl.float64)
    norm = tl.sqrt(tl.sum(sums)) * (tl.load(scale) / loss_scale)
    unscaled = 1.0 / loss_scale
    most = tl.load(limit)
    clipped = most / (norm + 1e-6)
    factor = tl.where(most > 0, tl.where(clipped >= 1, unscaled, unscaled * clipped), unscaled)
    tl.store(result, norm)
    tl.store(result + 1, factor)
