"""gated: what opens a gate goes through an activation, times what passes it (Shazeer, 2020, arXiv 2002.05202).

    y = f(gate) up              f is silu, gelu, or gelu by tanh ("gelu_tanh")

    d up = dy f(gate)           d gate = dy up f'(gate)

The operators apart keep gate, f(gate) and up for backward. This keeps gate and up, and computes f once more: an eighth
of what a decoder layer keeps, for an activation that reads and writes once. Every bit is as with the operators apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_private.tensors import is_batched_gradient
from .calls import by_reference, is_plain, needs_backward
from .library import composite

aten = torch.ops.aten
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Any, dict[str, str]]] = {  # f, its derivative's operator
    "silu": (F.silu, aten.silu_backward, {}),
    "gelu": (F.gelu, aten.gelu_backward, {}),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), aten.gelu_backward, {"approximate": "tanh"}),
}


def reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The equation. gate and up are of one shape and dtype."""
    return ACTIVATIONS[activation][0](gate) * up


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up if ctx.needs_input_grad[0] else None)
        ctx.activation = activation
        return ACTIVATIONS[activation][0](gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        f, derivative, options = ACTIVATIONS[ctx.activation]
        needs_gate, needs_up, _ = ctx.needs_input_grad
        if needs_gate and torch.is_grad_enabled():  # somebody wants the derivative of this too
            return _by_autograd(gate, up, ctx.activation, dy, ctx.needs_input_grad)
        in_place = not torch.is_grad_enabled() and not is_batched_gradient(dy)
        d_gate = d_up = None
        if needs_up:
            d_up = f(gate).mul_(dy) if in_place else f(gate) * dy
        if needs_gate:
            through = dy * up
            into = {"grad_input": through} if in_place else {}
            d_gate = derivative(through, gate, **options, **into)
        return d_gate, d_up, None


def _by_autograd(gate: Tensor, up: Tensor, activation: str, dy: Tensor, needs: Sequence[bool]) -> tuple[Any, ...]:
    gate, up = gate.view_as(gate), up.view_as(up)  # one may be made of the other: what leads there is not this one's
    wanted = [tensor for tensor, needed in zip((gate, up), needs) if needed]
    found = iter(torch.autograd.grad(reference(gate, up, activation), wanted, dy, create_graph=True))
    return *(next(found) if needed else None for needed in needs[:2]), None


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """As `reference`; vmap and forward-mode derivatives go by the reference itself."""
    own = needs_backward(gate, up) and is_plain(gate) and is_plain(up) and not by_reference()
    return _Gated.apply(gate, up, activation) if own else reference(gate, up, activation)


composite("gated(Tensor gate, Tensor up, str activation) -> Tensor", gated)
