"""rms_norm: root mean square normalisation as one operator.

    y  = x r w                 r = (mean(x²) + ε)^-½, of each row; w may be left out

    dx = r g - x r³ mean(g x),   g = dy w           dw = Σ dy x r, over rows

On a CPU, for which torch has no kernel of it, training goes by these formulas: they read and write about half as much
as autograd does for the single operators, and keep x and r. Elsewhere, and under a compiler, it is torch's operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .calls import by_reference, is_plain, needs_backward, rows
from .library import composite
from .modes import without_autocast


def reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """torch's own operator."""
    return torch.rms_norm(x, x.shape[-1:], weight, eps)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each row of a with that of b. Autocast would round it, unlike other ways to write a norm."""
    with without_autocast("cpu"):
        return torch.linalg.vecdot(a, b)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        r = _dots(x, x).unsqueeze_(-1).div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        ctx.eps = eps
        y = x * r
        return y if weight is None else y.mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants the derivative of this too, and r is a function of x
            r = (x.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx = d_weight = None
        if needs_x:
            g = dy if weight is None else dy * weight
            slope = _dots(g, x).unsqueeze(-1) * r.pow(3) / -x.shape[-1]
            if weight is None or torch.is_grad_enabled():
                dx = torch.addcmul(g * r, x, slope)
            else:  # in the memory of g
                dx = g.mul_(r).addcmul_(x, slope)
        if needs_weight:
            d_weight = rows(dy * x * r).sum(0)
        return dx, d_weight, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """y = x (mean(x²) + ε)^-½ w, over the last dimension (Zhang and Sennrich, 2019, arXiv 1910.07467).

    x is (…, n), `weight` w (n,) of its dtype or None, `eps` ε; y is (…, n). Floating dtypes on any device. All
    derivatives can be taken. A weight of another size is torch's RuntimeError.
    """
    own = x.device.type == "cpu" and needs_backward(x, weight) and is_plain(x) and not by_reference()
    return _RmsNorm.apply(x, weight, eps) if own else reference(x, weight, eps)


composite("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor", rms_norm)
