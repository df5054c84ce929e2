"""Updates: what the operators share that are several layers of one input with a LoRA update each.

    hᵢ = z Aᵢᵀ      g = [dy₁ B₁   dy₂ B₂ …]      dA = s · gᵀ z      dBᵢ = s · dyᵢᵀ hᵢ      dbᵢ = dyᵢᵀ 1

A is the Aᵢ on top of one another, and z their input. s is a factor within a product's kernel, never a kernel of its
own. Where layers have scalings of their own, g is [s₁ · dy₁ B₁   s₂ · dy₂ B₂ …], and s is 1 where it stands before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cpu import matmul, over_rows


def by_role(flat: Sequence[Any], count: int) -> tuple[tuple[Any, ...], ...]:
    """What there is of each tensor that a layer has, of `count` layers: all weights, say, all biases, As and Bs."""
    return tuple(tuple(flat[place : place + count]) for place in range(0, len(flat), count))


def _apart(scalings: Sequence[float]) -> tuple[float, list[float]]:
    """s, and what each layer's part of g is multiplied by."""
    if len(set(scalings)) == 1:
        return scalings[0], [1.0] * len(scalings)
    return 1.0, list(scalings)


def through_updates(
    dys: Sequence[Tensor | None], z: Tensor, scalings: Sequence[float], lora_Bs: Sequence[Tensor]
) -> tuple[Tensor, float]:
    """g (rows, Σ rᵢ), and s. A layer whose output nobody used has no dy, and zeros in g."""
    scaling, own = _apart(scalings)
    each = [
        z.new_zeros(z.shape[0], lora_B.shape[1]) if dy is None else matmul(dy, lora_B, factor)
        for dy, lora_B, factor in zip(dys, lora_Bs, own)
    ]
    return each[0] if len(each) == 1 else torch.cat(each, -1), scaling


def of_updates(
    dys: Sequence[Tensor | None],
    z: Tensor,
    hidden: Tensor,
    g: Tensor,
    scalings: Sequence[float],
    lora_As: Sequence[Tensor],
    needs: Sequence[Sequence[bool]],
) -> list[Tensor | None]:
    """The gradients of all biases, As and Bs: those that are needed, None for the others.

    `hidden` and g are (rows, Σ rᵢ). A layer whose output nobody used has no dy, and its tensors get no gradients.
    """
    needs_biases, needs_As, needs_Bs = needs
    ranks, scaling = [lora_A.shape[0] for lora_A in lora_As], _apart(scalings)[0]
    all_As = over_rows(g, z, scaling).split(ranks) if any(needs_As) else [None] * len(dys)
    d_biases = [dy.sum(0) if needed and dy is not None else None for needed, dy in zip(needs_biases, dys)]
    d_As = [d_A if needed and dy is not None else None for d_A, needed, dy in zip(all_As, needs_As, dys)]
    d_Bs = [
        over_rows(dy, part, factor) if needed and dy is not None else None
        for needed, dy, part, factor in zip(needs_Bs, dys, hidden.split(ranks, -1), scalings)
    ]
    return [*d_biases, *d_As, *d_Bs]
