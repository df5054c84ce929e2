"""The kernel of `cross_entropy.py`: one program a row, which goes through the row's classes block by block, twice.

    l = c · tanh(k · p / c)        m = max l        s = Σ exp(l - m)
    loss = log s + m - (1 - ε) l[label] - ε mean(l)
    p  <-  (exp(l - m) / s - (1 - ε) [class = label] - ε / classes) · (1 - (l / c)²) · k · factor

The first time through finds m and s together: what was added up for a smaller maximum is scaled down when a block has a
greater one (Milakov and Gimelshein, 2018, arXiv 1805.02867). Sums are kept for each place in a block and added up at
the end, so that the maximum is all that threads exchange for a block. The second time goes backwards, for the blocks
that were read last are still in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cross_entropy_of_a_row(
    products,
    stride,
    labels,
    losses,
    factor,
    ignore_index,
    smoothing,
    softcap,
    scale,
    CLASSES: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a row's loss to `losses`, and the gradient over the row of `products` if it `WRITES`."""
    row = tl.program_id(0)
    own = products + row.to(tl.int64) * stride  # a matrix may have more than 2³¹ elements
    label = tl.load(labels + row)
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if WRITES:
            _clear(own, CLASSES, BLOCK)
    else:
        tl.device_assert((label >= 0) & (label < CLASSES), "a label is no class")
        chosen = _logits(tl.load(own + label), softcap, scale, CAPPED)
        highest, total, mean = _statistics(own, softcap, scale, CLASSES, CAPPED, SMOOTHED, BLOCK)
        loss = tl.log(total) - (1 - smoothing) * (chosen - highest)
        if SMOOTHED:
            loss -= smoothing * (mean - highest)
        tl.store(losses + row, loss)
        if WRITES:
            tl.debug_barrier()  # until all threads have read `chosen`
            by = scale * tl.load(factor)
            _write(own, label, highest, 1 / total, smoothing, softcap, scale, by, CLASSES, CAPPED, BLOCK)


@triton.jit
def _statistics(
    own, softcap, scale, CLASSES: tl.constexpr, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr
):
    """The greatest logit m of a row, Σ exp(l - m), and the mean of the logits if the loss is `SMOOTHED`."""
    places = tl.arange(0, BLOCK)
    highest = -3e38  # finite, for a block of nothing but -inf
    sums, logits_sums = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, CLASSES, BLOCK):
        there = start + places < CLASSES
        logits = _logits(tl.load(own + start + places, there, 0.0), softcap, scale, CAPPED)
        if SMOOTHED:
            logits_sums += tl.where(there, logits, 0.0)
        logits = tl.where(there, logits, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, 0))
        sums = sums * tl.exp(highest - higher) + tl.exp(logits - higher)
        highest = higher
    return highest, tl.sum(sums, 0), tl.sum(logits_sums, 0) / CLASSES


@triton.jit
def _write(
    own,
    label,
    highest,
    inverse,
    smoothing,
    softcap,
    scale,
    by,
    CLASSES: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a row's gradient, times `by`, over its products."""
    places = tl.arange(0, BLOCK)
    blocks: tl.constexpr = (CLASSES + BLOCK - 1) // BLOCK
    for number in range(blocks):
        start = (blocks - 1 - number) * BLOCK
        there = start + places < CLASSES
        logits = _logits(tl.load(own + start + places, there, 0.0), softcap, scale, CAPPED)
        gradient = tl.exp(logits - highest) * inverse - smoothing / CLASSES
        gradient -= tl.where(start + places == label, 1 - smoothing, 0.0)
        if CAPPED:
            capped = logits / softcap
            gradient *= 1 - capped * capped
        tl.store(own + start + places, (gradient * by).to(own.dtype.element_ty), there)


@triton.jit
def _clear(own, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    for start in range(0, CLASSES, BLOCK):
        tl.store(own + start + places, tl.zeros([BLOCK], own.dtype.element_ty), start + places < CLASSES)


@triton.jit
def _logits(products, softcap, scale, CAPPED: tl.constexpr):
    logits = products.to(tl.float32) * scale
    if CAPPED:
        logits = softcap * _tanh(logits / softcap)
    return logits


@triton.jit
def _tanh(x):
    """tanh, to a few units in the last place: by a power series where 1 - exp(-2|x|) would lose digits."""
    squared = x * x
    series = x * (1 + squared * (-1 / 3 + squared * (2 / 15 + squared * (-17 / 315 + squared * (62 / 2835)))))
    power = tl.exp(-2 * tl.abs(x))
    quotient = (1 - power) / (1 + power)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -quotient, quotient))
