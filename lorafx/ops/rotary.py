"""rotary: rotary position embedding as one operator.

    y = x cos + turn(x) sin

The last dimension is made of pairs (a, b): a its first half and b its second, or, interleaved, a its even places and b
its odd ones. `turn` gives (-b, a). The gradient has turn's transpose in its place, `turn'`, which gives (b, -a):

    dx = dy cos + turn'(dy sin)

cos and sin may differ within a pair. In eager training both go pair by pair, in two passes over memory, where the
single operators write down -b, the turned tensor and two products; nothing is kept but cos and sin. Everywhere else it
is the equation: a compiler fuses that itself, and inference gives the bits that the model gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .calls import by_reference, is_plain, needs_backward
from .library import composite


def reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The equation, in operators of torch."""
    a, b = _pairs(x, interleaved)
    turned = torch.stack((-b, a), -1).flatten(-2) if interleaved else torch.cat((-b, a), -1)
    return x * cos + turned * sin


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)  # type: ignore[return-value]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The equation pair by pair, in the memory of x cos."""
    y = x * cos
    (a, b), (y_a, y_b), (sin_a, sin_b) = (_pairs(each, interleaved) for each in (x, y, sin))
    y_a.addcmul_(b, sin_a, value=-1)
    y_b.addcmul_(a, sin_b)
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotated(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """turn'(dy sin) is turn(dy) times the sines of each pair in the other's place, negated."""
        cos, sin = ctx.saved_tensors
        a, b = _pairs(-sin, ctx.interleaved)
        swapped = torch.stack((b, a), -1).flatten(-2) if ctx.interleaved else torch.cat((b, a), -1)
        run = reference if torch.is_grad_enabled() else _rotated
        return run(dy, cos, swapped, ctx.interleaved), None, None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """y = x cos + turn(x) sin, of the shape of x (Su et al., 2021, arXiv 2104.09864).

    x is (…, n) with n even; cos and sin can be broadcast to its shape and are of its dtype, any floating one, on its
    device. The pairs that turn are the halves of the last dimension or, `interleaved`, neighbours. All derivatives can
    be taken, also of cos and sin. Shapes that do not fit are torch's RuntimeError.
    """
    own = needs_backward(x) and not needs_backward(cos, sin) and is_plain(x) and not by_reference()
    return _Rotary.apply(x, cos, sin, interleaved) if own else reference(x, cos, sin, interleaved)


composite("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor", rotary)
