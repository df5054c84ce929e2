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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .calls import by_reference, needs_backward, rows, without_derivative
from .cpu import add_over_rows, linear, matmul, wide_where_slow
from .cuda import cross_entropy_in_place, has_cross_entropy_for
from .dtypes import at_least_float32
from .library import LIBRARY, composite
from .modes import autocast_dtype

ROWS, ROWS_ON_CPU = 1024, 512  # at least in a chunk, so that its products are bound by arithmetic
_CHUNK = 2**22  # logits in a chunk, where that makes more rows
_TILE, _TILE_ON_CPU = 2**22, 2**19  # logits in float32 at a time; on a GPU smaller tiles would cost calls
_MEAN = 1  # as aten numbers reductions; the sum is 2
_Options = tuple[int, float, float | None, float, Tensor]  # ignore_index to scale, and what gradients are multiplied by


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
        # Divided before they are rounded, as autograd's are; those of float16 wait for the loss's scale (or underflow).
        divided = mean and given[0].dtype != torch.float16  # type: ignore[union-attr]
        total, *gradients = torch.ops.lorafx.chunked_cross_entropy(*given, scaling, labels, *options, divided)
        count = (labels != options[0]).sum()
        ctx.divides = mean and not divided
        ctx.save_for_backward(count, *gradients)
        return total / count if mean else total

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        count, *gradients = ctx.saved_tensors
        factor = d_loss / count.clamp(min=1) if ctx.divides else d_loss  # the mean of no rows is nan, its gradient zero
        needed = zip(ctx.needs_input_grad[4:], gradients)
        found = [gradient * factor if needs else None for needs, gradient in needed]
        if torch.is_grad_enabled():
            found = [g if g is None else without_derivative(g, _ONCE) for g in found]
        return None, None, None, None, *found


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
    divided: bool,
) -> tuple[Tensor, ...]:
    """The sum over rows, and its gradients with respect to the first five: empty tensors where none is needed.

    The gradients are those of the mean if `divided`.
    """
    given = wide_where_slow(rows(x), weight, bias, None if hidden is None else rows(hidden), lora_B)
    if labels.numel() != len(given[0]):
        raise ValueError(f"{labels.numel()} labels for {len(given[0])} rows")
    gradients = [_zeros(t, need, x, number in (0, 3)) for number, (t, need) in enumerate(zip(given, needs))]
    total, labels = at_least_float32(x.new_zeros(())), labels.reshape(-1)
    count = (labels != ignore_index).sum() if divided else torch.ones_like(total)
    options = ignore_index, label_smoothing, softcap, scale, torch.ones_like(total) / count.clamp(min=1)
    with torch.autocast("cpu", enabled=False):  # products are in the dtype of what is given, or in float32
        for chosen in _chunks(labels, ignore_index, weight.shape[0]):
            total += _chunk(chosen, given, scaling, _taken(labels, chosen), options, needs, gradients)
    likes = x, weight, bias, hidden, lora_B
    shaped = [g.to(t.dtype).view(t.shape) if need else g for g, t, need in zip(gradients, likes, needs)]  # type: ignore
    return total, *shaped


def _chunks(labels: Tensor, ignore_index: int, classes: int) -> Sequence[Tensor | range]:
    """The rows of each chunk: those that count, where the host can know them without waiting, or else all."""
    if not _is_readable(labels):
        most = max(ROWS, _CHUNK // classes)
        return [range(start, min(start + most, len(labels))) for start in range(0, len(labels), most)]
    counted = (labels != ignore_index).nonzero()[:, 0]
    _require_classes(labels[counted], classes)
    return counted.split(max(ROWS_ON_CPU, _CHUNK // classes))


def _is_readable(labels: Tensor) -> bool:
    """Whether the host can look at labels without waiting for another device."""
    return labels.is_cpu


def _require_classes(labels: Tensor, classes: int) -> None:
    """Raise what torch's loss raises."""
    if (wrong := labels[(labels < 0) | (labels >= classes)]).numel():
        raise IndexError(f"Target {int(wrong[0])} is out of bounds.")


def _zeros(tensor: Tensor | None, need: bool, x: Tensor, by_rows: bool) -> Tensor:
    """Zeros for a gradient, empty if none is needed. One that chunks add up to, not by rows, is at least in float32."""
    if tensor is None or not need:
        return x.new_empty(0)
    dtype = tensor.dtype if by_rows else torch.promote_types(tensor.dtype, torch.float32)
    return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _chunk(
    chosen: Tensor | range,
    given: tuple[Any, ...],
    scaling: float,
    labels: Tensor,
    options: _Options,
    needs: list[bool],
    gradients: list[Tensor],
) -> Tensor:
    """The sum over the `chosen` rows; what they add to the gradients is written to `gradients`."""
    x, weight, bias, hidden, lora_B = given
    x = _taken(x, chosen)
    products = linear(x, weight, bias)
    if hidden is not None:
        hidden = _taken(hidden, chosen)
        products.addmm_(hidden, lora_B.t(), alpha=scaling)
    in_place = cross_entropy_in_place if has_cross_entropy_for(products, labels) else _in_place
    total = in_place(products, labels, *options, any(needs))
    if needs[0]:
        _give(gradients[0], chosen, products, weight)
    if needs[1]:
        add_over_rows(gradients[1], products, x)
    if needs[2]:
        gradients[2] += products.sum(0, dtype=gradients[2].dtype)
    if needs[3]:
        _give(gradients[3], chosen, products, lora_B, scaling)
    if needs[4]:
        add_over_rows(gradients[4], products, hidden, scaling)
    return total


def _taken(tensor: Tensor, chosen: Tensor | range) -> Tensor:
    """The chosen rows of a tensor: a view of it if they lie side by side."""
    return tensor.narrow(0, chosen.start, len(chosen)) if isinstance(chosen, range) else tensor[chosen]


def _give(gradient: Tensor, chosen: Tensor | range, left: Tensor, right: Tensor, scaling: float = 1.0) -> None:
    """Write scaling · left @ right to the chosen rows of a gradient."""
    if isinstance(chosen, range):
        _taken(gradient, chosen).addmm_(left, right, beta=0, alpha=scaling)
    else:
        product = matmul(left, right)
        gradient[chosen] = product if scaling == 1.0 else product.mul_(scaling)


def _in_place(
    products: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    scale: float,
    factor: Tensor,
    needed: bool,
) -> Tensor:
    """The sum over a chunk's products (rows, out). If a gradient is needed they become it, times `factor`."""
    total = at_least_float32(products.new_zeros(()))
    rows = max(1, (_TILE_ON_CPU if products.is_cpu else _TILE) // products.shape[1])
    for tile, label in zip(products.split(rows), labels.unsqueeze(1).split(rows)):
        ignored, by = None if _is_readable(labels) else label == ignore_index, scale * factor
        if ignored is not None:
            label, by = label.masked_fill(ignored, 0), by.masked_fill(ignored, 0)
        losses = _tile(tile, label, label_smoothing, softcap, scale, by if needed else None)
        total += (losses if ignored is None else losses.masked_fill_(ignored, 0)).sum()
    return total


def _tile(
    tile: Tensor, label: Tensor, label_smoothing: float, softcap: float | None, scale: float, by: Tensor | None
) -> Tensor:
    """The losses (rows, 1) of a few rows of products. They become their gradients times `by`, unless it is None."""
    logits, capped = at_least_float32(tile) if scale == 1.0 else at_least_float32(tile) * scale, None
    if softcap is not None:
        capped = torch.tanh(logits / softcap)
        logits = capped * softcap
    logs = torch.log_softmax(logits, -1)
    losses = logs.gather(1, label).mul_(label_smoothing - 1)
    if label_smoothing:
        losses -= logs.mean(1, keepdim=True).mul_(label_smoothing)
    if by is None:
        return losses
    gradient = logs.exp_()
    if label_smoothing:
        gradient -= label_smoothing / tile.shape[1]
    gradient.scatter_add_(1, label, gradient.new_full((), label_smoothing - 1).expand_as(label))
    if capped is not None:
        gradient *= 1 - capped.square_()
    torch.mul(gradient, by, out=tile)
    return losses


def _shapes(x: Tensor, weight: Tensor, bias: Any, hidden: Any, lora_B: Any, *options: Any) -> tuple[Tensor, ...]:
    given, needs = (x, weight, bias, hidden, lora_B), options[-2]
    gradients = [
        t.new_empty(t.shape) if need else torch.empty(0, device=x.device if t is None or not need else t.device)
        for t, need in zip(given, needs)
    ]
    return x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32)), *gradients


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
    " bool[] needs, bool divided) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
LIBRARY.impl("chunked_cross_entropy", _chunked, "CompositeExplicitAutograd")
torch.library.register_fake("lorafx::chunked_cross_entropy", _shapes, lib=LIBRARY)
