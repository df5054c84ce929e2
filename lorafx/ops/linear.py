"""linear: ATen's linear operator as it is, but in training with the products of `products` and `wide`, both ways.

y = x Wᵀ + b            dx = dy W            dW = dyᵀ x            db = Σ dy, over rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .calls import by_reference, needs_backward, rows
from .cpu.products import is_plain_bias, matmul, onednn_pays, over_rows
from .cpu.products import linear as product
from .cpu.wide import pays, widened
from .library import composite

_output = widened(product)


class _Linear(torch.autograd.Function):
    """Keeps what it needs of x and W as they are given: autograd would keep their wide copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _output(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(dy, *ctx.saved_tensors, *ctx.needs_input_grad)


@widened
def _gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor | None, ...]:
    dx = None if weight is None else matmul(dy, weight)
    d_weight = None if x is None else over_rows(rows(dy), rows(x))
    return dx, d_weight, rows(dy).sum(0) if needs_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, in) times `weight` (out, in), transposed, plus `bias` (out)."""
    faster = (pays(x) or onednn_pays(x, weight)) and is_plain_bias(bias, weight)
    if faster and needs_backward(x, weight, bias) and not by_reference():
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


composite("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", linear)
