"""A linear layer that a gradient goes through, with the products of this room forward and backward.

y = x Wᵀ + b            dx = dy W            dW = dyᵀ x            db = Σ dy, over rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..calls import rows
from . import products
from .half_precision import is_slow, pays, widened_where_slow
from .products import is_plain_bias, linear, matmul, onednn_pays, over_rows

_output = widened_where_slow(linear)


class _Linear(torch.autograd.Function):
    """Keeps what it needs of x and W in the dtype they are given in: autograd would keep the float32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _output(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(dy, *ctx.saved_tensors, *ctx.needs_input_grad)


@widened_where_slow
def _gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor | None, ...]:
    dx = None if weight is None else matmul(dy, weight)
    d_weight = None if x is None else over_rows(rows(dy), rows(x))
    return dx, d_weight, rows(dy).sum(0) if needs_bias else None


def has_linear_for(x: Tensor) -> bool:
    """Whether this processor may have a faster way than ATen's to train a linear layer on values like x."""
    return is_slow(x) or (x.is_cpu and x.dtype == torch.float32 and products.mkl_leaves_avx512())


def trained_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, in) times `weight` (out, in), transposed, plus `bias` (out): ATen's operator where that is as fast."""
    if (pays(x) or onednn_pays(x, weight)) and is_plain_bias(bias, weight):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)
