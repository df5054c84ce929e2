"""lora_by_row: each row of a batch gets the LoRA update of its own adapter, by one batched product for all of them.

    y'ᵢ = yᵢ + s · (dropout(xᵢ, p) Aᵀ) Bᵀ        A, B, s and p of the adapter that row i has; y'ᵢ = yᵢ if it has none

The As are put on top of one another, (adapters + 1, r, in), smaller ranks padded by zeros, and each row takes its own:
(rows, r, in). So it costs what one adapter costs and two copies of small matrices, however many adapters there are, and
an adapter that has diverged does nothing to the rows of others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .library import composite


def is_of_row(rows: Tensor, like: Tensor, number: int) -> Tensor:
    """Where a tensor belongs to rows, or tokens, whose adapter has a number: booleans of its leading sizes, else 1.

    `rows` is (rows,); `like` has the rows first, each as often as there are tokens in it: (rows · tokens, …). Where
    tokens have adapters of their own it is (rows, tokens), and `like` (rows, t, …) or (rows · t, …), of the last t.
    """
    mask = rows == number
    if rows.ndim == 2:
        mask, leading = _last(mask, like), 2 if like.ndim > 2 else 1
        return mask.reshape(*like.shape[:leading], *(1 for _ in like.shape[leading:]))
    if like.shape[0] != rows.shape[0]:
        mask = mask.unsqueeze(1).expand(-1, like.shape[0] // rows.shape[0]).reshape(-1)
    return mask.view(-1, *(1 for _ in like.shape[1:]))


def lora_by_row(
    y: Tensor,
    x: Tensor,
    rows: Tensor,
    numbers: Sequence[int],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropouts: Sequence[float],
) -> Tensor:
    """y with each row's update, of the shape and dtype of y.

    y is (…, out), x (…, in), both with the rows first: (rows, …) or (rows · tokens, features). `rows`, (rows,) of
    int64, has the number of each row's adapter; or (rows, tokens), each token's, 0 where it does not act. `numbers` are
    those of the adapters here: for each an A (rₖ, in), a B (out, rₖ), a scaling and a dropout's probability, 0 where
    nothing is dropped. A row of any other number gets y.
    """
    count, rank = rows.shape[0], max(a.shape[0] for a in lora_As)
    acts = _last(rows != 0, x) if rows.ndim == 2 else None
    places = _places(rows if acts is None else rows[:, -1], numbers)
    inner = x.reshape(count, -1, x.shape[-1])
    outer = y.reshape(count, -1, y.shape[-1])
    one_scaling = scalings[0] if len(set(scalings)) == 1 else None
    if one_scaling is None:
        lora_Bs = [b * s for b, s in zip(lora_Bs, scalings)]
    narrow = _stacked(lora_As, [(0, 0, 0, rank - a.shape[0]) for a in lora_As]).index_select(0, places)
    wide = _stacked(lora_Bs, [(0, rank - b.shape[1]) for b in lora_Bs]).index_select(0, places)
    hidden = torch.bmm(_dropped(inner, places, dropouts), narrow.transpose(1, 2))
    if acts is not None:
        acts = acts if x.ndim <= 3 else acts.repeat_interleave(inner.shape[1] // acts.shape[1], 1)
        hidden = torch.where(acts.unsqueeze(-1), hidden, 0)
    alpha = 1.0 if one_scaling is None else one_scaling
    if outer.dtype == hidden.dtype:
        return torch.baddbmm(outer, hidden, wide.transpose(1, 2), alpha=alpha).view(y.shape)
    return (outer + torch.bmm(hidden, wide.transpose(1, 2)) * alpha).to(y.dtype).view(y.shape)


def _last(tokens: Tensor, like: Tensor) -> Tensor:
    """What (rows, tokens) has for the last tokens of each row, as many as another tensor has: all, or the last one."""
    rows, width = tokens.shape
    count = like.shape[1] if like.ndim > 2 else like.shape[0] // rows
    if count > width:
        raise ValueError(f"{tuple(like.shape)} has more tokens than the {rows} rows, which have {width}")
    return tokens[:, width - count :]


def _places(rows: Tensor, numbers: Sequence[int]) -> Tensor:
    """Where in a stack of zeros and these adapters each row's adapter is. No table is moved to a device for it."""
    places = torch.zeros_like(rows)
    for place, number in enumerate(numbers, 1):
        if place != number:
            return sum(((rows == number) * place for place, number in enumerate(numbers, 1)), start=places)
    return torch.where(rows <= len(numbers), rows, places)


def _stacked(matrices: Sequence[Tensor], padding: Sequence[tuple[int, ...]]) -> Tensor:
    """Zeros and the matrices, padded to one size: (adapters + 1, …)."""
    padded = [F.pad(each, pad) if any(pad) else each for each, pad in zip(matrices, padding)]
    return torch.stack([torch.zeros_like(padded[0]), *padded])


def _dropped(x: Tensor, places: Tensor, dropouts: Sequence[float]) -> Tensor:
    """x (rows, tokens, in) with a share of each row zeroed, as its adapter has it."""
    if not any(dropouts):
        return x
    if len(set(dropouts)) == 1:
        return F.dropout(x, dropouts[0])
    kept = torch.cat([x.new_ones(1), *(x.new_full((1,), 1 - p) for p in dropouts)])[places].view(-1, 1, 1)
    return torch.where(torch.rand_like(x) < kept, x / kept, 0)


composite("is_of_row(Tensor rows, Tensor like, int number) -> Tensor", is_of_row)
composite(
    "lora_by_row(Tensor y, Tensor x, Tensor rows, int[] numbers, Tensor[] lora_As, Tensor[] lora_Bs, float[] scalings,"
    " float[] dropouts) -> Tensor",
    lora_by_row,
)
