"""linear_cross_entropy: an output head and the cross entropy of its logits, which are never there all at once.

    l = c · tanh(k · (x Wᵀ + b + s · h Bᵀ) / c)          h Bᵀ: the head's own LoRA update, h = z Aᵀ; c: a soft cap
    loss = Σ -log softmax(l)[label]  over rows whose label is not `ignore_index`, or the mean of these

    g  = (softmax(l) - one-hot(label)) · k · (1 - (l / c)²)      the gradient of the sum with respect to the products
    dx = g W     dW = gᵀ x     db = Σ g     dh = s · g B     dB = s · gᵀ h

Rows are taken in chunks of at least `ROWS`. A chunk's products are replaced in their own memory by g, in float32, and
what each gradient needs of g is added up before the next chunk. So the gradients are there when the forward pass ends;
backward scales them. What is kept is these gradients: for a frozen head one tensor of the size of x. The peak is one
chunk's products.

On a CPU rows with ignored labels are left out first, and g is made a few rows at a time. On another device the host
would have to wait for the labels before it can launch what follows. So there all rows are multiplied, g is zero in
ignored ones, and nothing is read from the device: a step waits for nothing, and a CUDA graph may be made of it. One
kernel makes g (`cuda/`). 1024 rows are for a GPU's products: it needs 184 operations a byte (790 TFLOP/s, 4.3 TB/s), of
which reading W gives one a row; g W, 4096 wide, then has 128 tiles of 128 x 256 for 132 processors, not 64.

The method is that of the chunked losses in Liger-Kernel, with chunks so large that arithmetic, not memory, bounds their
products. torch 2.13's own `linear_cross_entropy` goes by chunks too, without soft cap, update or smoothing; it
scales in place the gradients that it keeps. On two CPU cores (1024 rows, 32k
classes, width 512) torch's took 3.9 times as long as logits and loss apart in float32 and 3.6 in bfloat16, this one
0.98 and 0.73.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .calls import by_reference, needs_backward, rows, without_derivative
from .cpu import add_over_rows, linear, matmul, wide_where_slow
from .cuda import cross_entropy_in_place, has_cross_entropy_for
from .dtypes import at_least_float32
from .library import LIBRARY, composite
from .modes import autocast_dtype, without_autocast

ROWS, ROWS_ON_CPU = 1024, 512  # at least in a chunk, so that its products are bound by arithmetic
_CHUNK = 2**22  # logits in a chunk, where that makes more rows
_TILE, _TILE_ON_CPU = 2**22, 2**19  # logits in float32 at a time; on a GPU smaller tiles would cost calls
_MEAN = 1  # as aten numbers reductions; the sum is 2
# ignore_index to scale, and what gradients are multiplied by
_Options = tuple[int, float, float | None, float, Tensor | float]


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    labels: Tensor,
    reduction: int = _MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The equation, in operators of torch: products in the dtype of x, the rest in float32 (float64 for float64)."""
    logits = F.linear(x, weight, bias)
    if hidden is not None and lora_B is not None:
        logits = logits + scaling * F.linear(hidden, lora_B)
    logits = at_least_float32(logits).reshape(-1, weight.shape[0]) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return torch.ops.aten.cross_entropy_loss(logits, labels.reshape(-1), None, reduction, ignore_index, label_smoothing)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, labels: Tensor, reduction: int, scaling: float, options: tuple[Any, ...], *given: Tensor | None
    ) -> Tensor:
        mean = reduction == _MEAN
        loss, gradients = torch.ops.lorafx.chunked_cross_entropy.default(*given, scaling, labels, *options, mean)
        ctx.divides = mean and _divides_later(given[0])
        count = [(labels != options[0]).sum()] if ctx.divides else []
        ctx.save_for_backward(*gradients, *count)
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = iter(ctx.saved_tensors)
        found = [next(gradients) if needs else None for needs in ctx.needs_input_grad[4:]]
        factor = d_loss / next(gradients).clamp(min=1) if ctx.divides else d_loss
        found = [None if gradient is None else gradient * factor for gradient in found]
        if torch.is_grad_enabled():
            found = [g if g is None else without_derivative(g, _ONCE) for g in found]
        return None, None, None, None, *found


def _divides_later(x: Tensor | None) -> bool:
    """Whether the gradients of a mean are divided by the number of rows in backward, when they know the loss's scale.

    Those of float16 might underflow before. Others are divided before they are rounded, as autograd's are.
    """
    return x is not None and x.dtype == torch.float16


_ONCE = "linear_cross_entropy has no second derivative; leave `fuse_loss` out of the pipeline to take one"


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    labels: Tensor,
    reduction: int = _MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The cross entropy of softcap · tanh(scale · logits / softcap), logits = x Wᵀ + b + scaling · hidden Bᵀ, a scalar.

    x is (…, in), `weight` W (out, in), `bias` b (out,), `hidden` (…, r) and `lora_B` B (out, r) the head's LoRA update
    or None; these of one floating dtype, on any one device. `labels` are class numbers (…) of int64 or uint8; rows that
    have `ignore_index` do not count. `reduction` is ATen's number, 1 for the mean and 2 for the sum; `label_smoothing`
    is torch's. Without `softcap` it is the cross entropy of scale · logits. Products are in the dtype of x, or
    autocast's; the rest, and the result, in float32 (float64 for float64). The method: chunked losses of Liger-Kernel,
    Hsu et al., 2024, arXiv 2410.10989.

    Raises ValueError for a number of labels that is not that of rows, RuntimeError for a second derivative, and for a
    label that is no class IndexError on a CPU; on a GPU, as torch does, a device-side assertion at the next
    synchronisation. vmap and forward-mode derivatives go by the equation's own operators.
    """
    options = ignore_index, label_smoothing, softcap, scale
    if by_reference():
        return reference(x, weight, bias, hidden, lora_B, scaling, labels, reduction, *options)
    labels = labels.long() if labels.dtype == torch.uint8 else labels  # which torch's loss takes, too
    given = [_as_multiplied(tensor) for tensor in (x, weight, bias, hidden, lora_B)]
    needs = [needs_backward(tensor) for tensor in given]
    return _LinearCrossEntropy.apply(labels, reduction, scaling, (*options, needs), *given)


def _as_multiplied(tensor: Tensor | None) -> Tensor | None:
    dtype = None if tensor is None else autocast_dtype(tensor.device.type)
    return tensor if tensor is None or dtype is None or tensor.dtype == torch.float64 else tensor.to(dtype)


@torch.no_grad()
def _chunked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    scale: float,
    needs: list[bool],
    mean: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The sum over rows or their `mean`, and its gradients with respect to those of the first five that need one."""
    given = wide_where_slow(rows(x), weight, bias, None if hidden is None else rows(hidden), lora_B)
    if labels.numel() != len(given[0]):
        raise ValueError(f"{labels.numel()} labels for {len(given[0])} rows")
    gradients = [_zeros(t, number in (0, 3)) if need else None for number, (t, need) in enumerate(zip(given, needs))]
    labels = labels.reshape(-1)
    count, chunks = _chunks(labels, ignore_index, weight.shape[0])
    factor = _one_over(count, x) if mean and not _divides_later(x) else 1.0
    options = ignore_index, label_smoothing, softcap, scale, factor
    with without_autocast("cpu"):  # products are in the dtype of what is given, or in float32
        total = _sum(_chunk(chosen, given, scaling, _taken(labels, chosen), options, gradients) for chosen in chunks)
    likes = x, weight, bias, hidden, lora_B
    shaped = [g.to(t.dtype).view(t.shape) for g, t in zip(gradients, likes) if g is not None]  # type: ignore[union-attr]
    return (total / count if mean else total), shaped


def _chunks(labels: Tensor, ignore_index: int, classes: int) -> tuple[Tensor | int, Sequence[Tensor | range]]:
    """How many rows count, and the rows of each chunk: those, where the host can know them without waiting, or all."""
    counted = labels != ignore_index
    if not _is_readable(labels):
        most, end = max(ROWS, _CHUNK // classes), len(labels)
        return counted.sum(), [range(start, min(start + most, end)) for start in range(0, max(end, 1), most)]
    chosen = counted.nonzero().view(-1)
    return len(chosen), _parts(chosen, max(ROWS_ON_CPU, _CHUNK // classes))


def _parts(tensor: Tensor, most: int) -> Sequence[Tensor]:
    """At most so many rows each. To split few rows takes as long as to multiply them."""
    return tensor.split(most) if len(tensor) > most else (tensor,)


def _sum(totals: Iterable[Tensor]) -> Tensor:
    """The sum of scalars, in the memory of the first. None is kept: it could split memory that the next tile is for."""
    return functools.reduce(Tensor.add_, totals)


def _one_over(count: Tensor | int, x: Tensor) -> Tensor | float:
    """1 / count, and 1 for no rows: their mean is nan, its gradient zero."""
    if isinstance(count, int):
        return 1 / max(count, 1)
    return at_least_float32(x.new_ones(())) / count.clamp(min=1)


def _is_readable(labels: Tensor) -> bool:
    """Whether the host can look at labels without waiting for another device."""
    return labels.is_cpu


def _zeros(tensor: Tensor, by_rows: bool) -> Tensor:
    """Zeros for a gradient. One that chunks add up to, not by rows, is at least in float32."""
    dtype = tensor.dtype if by_rows else torch.promote_types(tensor.dtype, torch.float32)
    return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _chunk(
    chosen: Tensor | range,
    given: tuple[Any, ...],
    scaling: float,
    labels: Tensor,
    options: _Options,
    gradients: list[Tensor | None],
) -> Tensor:
    """The sum over the `chosen` rows; what they add to the gradients, where one is needed, is written to these."""
    x, weight, bias, hidden, lora_B = given
    dx, dW, db, dh, dB = gradients
    x = _taken(x, chosen)
    products = linear(x, weight, bias)
    if hidden is not None:
        hidden = _taken(hidden, chosen)
        products.addmm_(hidden, lora_B.t(), alpha=scaling)
    in_place = cross_entropy_in_place if has_cross_entropy_for(products, labels) else _in_place
    total = in_place(products, labels, *options, any(gradient is not None for gradient in gradients))
    if dx is not None:
        _give(dx, chosen, products, weight)
    if dW is not None:
        add_over_rows(dW, products, x)
    if db is not None:
        db += products.sum(0, dtype=db.dtype)
    if dh is not None:
        _give(dh, chosen, products, lora_B, scaling)
    if dB is not None:
        add_over_rows(dB, products, hidden, scaling)
    return total


def _taken(tensor: Tensor, chosen: Tensor | range) -> Tensor:
    """The chosen rows of a tensor: a view of it if they lie side by side."""
    return tensor.narrow(0, chosen.start, len(chosen)) if isinstance(chosen, range) else tensor.index_select(0, chosen)


def _give(gradient: Tensor, chosen: Tensor | range, left: Tensor, right: Tensor, scaling: float = 1.0) -> None:
    """Write scaling · left @ right to the chosen rows of a gradient."""
    if isinstance(chosen, range):
        _taken(gradient, chosen).addmm_(left, right, beta=0, alpha=scaling)
    else:
        gradient.index_copy_(0, chosen, matmul(left, right, scaling))


def _in_place(
    products: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    scale: float,
    factor: Tensor | float,
    needed: bool,
) -> Tensor:
    """The sum over a chunk's products (rows, out). If a gradient is needed they become it, times `factor`."""
    rows = max(1, (_TILE_ON_CPU if products.is_cpu else _TILE) // products.shape[1])
    options = ignore_index, label_smoothing, softcap, scale, scale * factor if needed else None
    tiles = zip(_parts(products, rows), _parts(labels, rows))
    return _sum(_tile(tile, label, *options) for tile, label in tiles)


def _tile(
    tile: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    scale: float,
    by: Tensor | float | None,
) -> Tensor:
    """The sum over a few rows of products. They become its gradient times `by`, unless that is None."""
    logits, capped = at_least_float32(tile) if scale == 1.0 else at_least_float32(tile) * scale, None
    if softcap is not None:
        capped = torch.tanh(logits / softcap)
        logits = capped * softcap
    logs = torch.log_softmax(logits, -1)
    total = F.nll_loss(logs, labels, ignore_index=ignore_index, reduction="sum")  # which knows labels that are no class
    ignored = None if _is_readable(labels) else labels == ignore_index
    if label_smoothing:
        means = logs.mean(1)
        means = means if ignored is None else means.masked_fill_(ignored, 0)
        total = (1 - label_smoothing) * total - label_smoothing * means.sum()
    if by is None:
        return total
    gradient = logs.exp_()
    if label_smoothing:
        gradient -= label_smoothing / tile.shape[1]
    column = (labels if ignored is None else labels.masked_fill(ignored, 0)).unsqueeze(1)
    gradient.scatter_add_(1, column, torch.full_like(column, label_smoothing - 1, dtype=gradient.dtype))
    if capped is not None:
        gradient *= 1 - capped.square_()
    torch.mul(gradient, by, out=tile)
    if ignored is not None:
        tile.masked_fill_(ignored.unsqueeze(1), 0)
    return total


def _shapes(x: Tensor, *others: Any) -> tuple[Tensor, list[Tensor]]:
    given, needs = (x, *others[:4]), others[-2]
    gradients = [tensor.new_empty(tensor.shape) for tensor, need in zip(given, needs) if need]
    return x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32)), gradients


_HEAD = "Tensor x, Tensor weight, Tensor? bias, Tensor? hidden, Tensor? lora_B, float scaling, Tensor labels"
# The chunks are an operator of their own, which compilers do not look into: they would unroll the loop over chunks for
# one number of rows.
composite(
    f"linear_cross_entropy({_HEAD}, int reduction=1, SymInt ignore_index=-100, float label_smoothing=0.0,"
    " float? softcap=None, float scale=1.0) -> Tensor",
    linear_cross_entropy,
)
LIBRARY.define(
    f"chunked_cross_entropy({_HEAD}, SymInt ignore_index, float label_smoothing, float? softcap, float scale,"
    " bool[] needs, bool mean) -> (Tensor, Tensor[])",
)
LIBRARY.impl("chunked_cross_entropy", _chunked, "CompositeExplicitAutograd")
torch.library.register_fake("lorafx::chunked_cross_entropy", _shapes, lib=LIBRARY)
