"""float8_linear: a linear layer whose weight is held in float8.

    y  = x̂ Wᵀ + b              W = diag(s) Q;  x̂ is x rounded to float8, row by row

    dx = ĝ Q,  g = dy diag(s)   ĝ is g rounded to float8, row by row

x̂ is taken for x in the derivative. W gets no gradient, and of the forward pass nothing is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .calls import by_reference, needs_backward, rows
from .float8 import from_float8, layer, quantised, through
from .library import composite


def reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The equation for y in operators of torch. Its derivative rounds no gradient."""
    q, row_scale = quantised(x.detach())
    rounded = x + (q.to(x.dtype) * row_scale - x.detach()).to(x.dtype)
    return F.linear(rounded, from_float8(weight, scale, x.dtype), bias)


class _Float8Linear(torch.autograd.Function):
    """Of a matrix x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return layer(quantised(x), weight, scale, bias, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        needs_x, _, _, needs_bias = ctx.needs_input_grad
        dx = through([dy], [weight], [scale]) if needs_x else None
        return dx, None, None, dy.sum(0) if needs_bias else None


def float8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y = x̂ (diag(s) Q)ᵀ + b (…, out), by products of float8 (`ops/float8.py`).

    x is (…, in), `bias` b (out,) of its dtype, which floats; `weight` Q (out, in) is float8_e4m3fn, `scale` s (out,)
    float32; one device, any. A GPU's products are used for bfloat16, and sizes of W that are multiples of 16.

    First derivatives of x and b alone. vmap and forward-mode derivatives go by `reference`. Sizes or dtypes that do not
    fit are torch's RuntimeError.
    """
    if by_reference():
        return reference(x, weight, scale, bias)
    flat = rows(x)
    if needs_backward(x, bias):
        y = _Float8Linear.apply(flat, weight, scale, bias)
    else:
        y = layer(quantised(flat), weight, scale, bias, flat)
    return y.view(*x.shape[:-1], weight.shape[0])


composite("float8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor", float8_linear)
