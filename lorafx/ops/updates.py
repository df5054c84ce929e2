"""Updates: what the operators share that are several layers of one input with a LoRA update each.

    hᵢ = z Aᵢᵀ      g = [s₁ · dy₁ B₁   s₂ · dy₂ B₂ …]      dA = gᵀ z      dBᵢ = sᵢ · dyᵢᵀ hᵢ      dbᵢ = dyᵢᵀ 1

A is the Aᵢ on top of one another, and z their input.
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


def through_updates(
    dys: Sequence[Tensor | None],
    z: Tensor,
    hidden: Tensor,
    scalings: Sequence[float],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor, list[Tensor | None]]:
    """g (rows, Σ rᵢ), and the gradients of all biases, As and Bs: those that are needed, None for the others.

    `hidden` is (rows, Σ rᵢ), too. A layer whose output nobody used has no dy, and its tensors get no gradients.
    """
    needs_biases, needs_As, needs_Bs = needs
    ranks = [lora_A.shape[0] for lora_A in lora_As]
    each = [
        z.new_zeros(z.shape[0], rank) if dy is None else matmul(dy, lora_B) * scaling
        for dy, lora_B, scaling, rank in zip(dys, lora_Bs, scalings, ranks)
    ]
    g = each[0] if len(each) == 1 else torch.cat(each, -1)
    all_As = over_rows(g, z).split(ranks) if any(needs_As) else [None] * len(dys)
    d_biases = [dy.sum(0) if needed and dy is not None else None for needed, dy in zip(needs_biases, dys)]
    d_As = [d_A if needed and dy is not None else None for d_A, needed, dy in zip(all_As, needs_As, dys)]
    d_Bs = [
        over_rows(dy, part) * scaling if needed and dy is not None else None
        for needed, dy, part, scaling in zip(needs_Bs, dys, hidden.split(ranks, -1), scalings)
    ]
    return g, [*d_biases, *d_As, *d_Bs]
