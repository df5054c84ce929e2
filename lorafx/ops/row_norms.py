"""row_norms: the norm of each row of a matrix with an update of low rank in it, without making the update.

    ‖W + B A‖²  =  ‖W‖² + Σ_r B ∘ (2 W Aᵀ + B A Aᵀ)        of each row: W (out, in), A (r, in), B (out, r)

That costs as much as r tokens do, and a read of W. The squares are as near as their dtype is to ‖W‖², so the norm of a
row that the update nearly cancels is less near: in float32, one of ‖W‖ / 100 is off by a thousandth of itself.

In a convolution with groups A (r, in) acts on all inputs, W (out, in / groups) on those of a group, and B is (out, r /
groups). PEFT takes for ΔW the product of B as (out / groups, r) and A, as (out, in / groups), and so does this.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .library import composite
from .modes import without_autocast


def reference(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """With the update in memory."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    update = b.to(dtype).reshape(-1, a.shape[0]) @ a.to(dtype)
    return torch.linalg.vector_norm(weight.to(dtype) + update.reshape(weight.shape), dim=1)


def row_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """‖W + B A‖ of each row, (out,), in float32 or, of a float64 weight, float64.

    `weight` is (out, in), `a` (r, in) and `b` (out, r), of any floating dtypes, or less in groups. It has no
    derivative: DoRA takes it for a constant (arXiv 2402.09353, section 4.3).
    """
    weight, a, b = weight.detach(), a.detach(), b.detach()
    if b.shape[1] != a.shape[0]:  # in groups
        with without_autocast(weight.device.type):
            return reference(weight, a, b)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with without_autocast(weight.device.type):  # it would round what is added up
        products = F.linear(weight, a.to(weight.dtype)).to(dtype)
        a, b = a.to(dtype), b.to(dtype)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
        squares = squares + (b * (2 * products + b @ (a @ a.t()))).sum(1)
    return squares.clamp_min(0).sqrt()


composite("row_norms(Tensor weight, Tensor a, Tensor b) -> Tensor", row_norms)
