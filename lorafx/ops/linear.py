"""linear: ATen's linear operator; in training, by the fastest products that this CPU has (`ops/cpu`)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .calls import by_reference, needs_backward
from .cpu import trained_linear
from .library import composite


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b (…, out) of x (…, in), `weight` (out, in) and `bias` (out,), all of one floating dtype.

    Any device. Inference, vmap and forward-mode derivatives are ATen's operator itself, and so are its errors.
    """
    if needs_backward(x, weight, bias) and not by_reference():
        return trained_linear(x, weight, bias)
    return F.linear(x, weight, bias)


composite("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", linear)
