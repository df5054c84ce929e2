"""lora_linear: a linear layer and its LoRA update as one operator with a backward of its own.

    y  = x Wᵀ + b + s · h Bᵀ,   h = z Aᵀ            z is x, or what dropout made of it

    dx = dy W + s · (dy B) A     (the second part to dz where z is not x)
    dA = s · (dy B)ᵀ z           dB = s · dyᵀ h

Of the forward pass it keeps x, z (or what makes it of x again, see `dropped`) and h, where autograd keeps what each
product was given. Of y, and of dx, the narrow product is written first and the wide one, which reads and writes far
less for each multiplication, is added to it in the same memory: a pass less than the other way round, and nothing is
written down by itself. It is the other way round by oneDNN (`products`), which adds to nothing. In half precision a
CPU may be faster by way of float32 (`wide`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import merged_linears as merging
from .calls import by_reference, is_plain, needs_backward, rows
from .cpu.products import accumulated, linear, matmul, onednn_pays, over_rows
from .cpu.wide import widened
from .dropped import Redraw, can_draw, draw
from .library import composite


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """The equation. x and z are (…, in), `weight` (out, in), `lora_A` (r, in), `lora_B` (out, r), all of one dtype."""
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x if z is None else z, lora_A), lora_B)


class _LoraLinear(torch.autograd.Function):
    """Of matrices. Without a `setup_context`, beside which torch inspects forward's signature at each call."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor | None, redraw: Redraw | None, *args: Any) -> tuple[Tensor, Tensor]:
        """With a mask, kept or to be drawn again, z is what it leaves of x, and is not kept."""
        x, weight, _, z, lora_A, lora_B, ctx.scaling = args
        y, hidden = _outputs(*args)
        ctx.redraw = redraw
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask, x, weight, z if mask is None and redraw is None else None, lora_A, lora_B, hidden)
        return y, hidden

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_hidden: Tensor | None) -> tuple[Tensor | None, ...]:
        """`d_hidden` is there in a second derivative alone: h is an output so that one can be taken."""
        mask, x, weight, z, lora_A, lora_B, hidden = ctx.saved_tensors
        mask = mask if ctx.redraw is None else ctx.redraw(x)
        z = z if mask is None else torch.where(mask, x, 0)
        given = dy, d_hidden, ctx.needs_input_grad[2:], ctx.scaling
        return None, None, *_gradients(*given, x, weight, z, lora_A, lora_B, hidden, mask), None


@widened
def _outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """y and h."""
    hidden = linear(x if z is None else z, lora_A)
    return updated(x, weight, bias, hidden, lora_B, scaling), hidden


@widened
def _gradients(
    dy: Tensor | None,
    d_hidden: Tensor | None,
    needs: tuple[bool, ...],
    scaling: float,
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    hidden: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias, z, A and B, in this order: those that are needed. With a mask z is what it leaves of x."""
    needs_x, needs_weight, needs_bias, needs_z, needs_A, needs_B, *_ = needs
    dx = dz = d_weight = d_bias = d_A = d_B = None
    if dy is not None:
        d_weight = over_rows(dy, x) if needs_weight else None
        d_bias = dy.sum(0) if needs_bias else None
        d_B = over_rows(dy, hidden) * scaling if needs_B else None
        through = matmul(dy, lora_B) * scaling
        d_hidden = through if d_hidden is None else d_hidden + through
    if d_hidden is not None:
        d_A = over_rows(d_hidden, x if z is None else z) if needs_A else None
        dz = matmul(d_hidden, lora_A) if needs_z else None
    if needs_x and d_hidden is not None and mask is not None:
        through = torch.where(mask, matmul(d_hidden, lora_A), 0)
        dx = through if dy is None else accumulated(through, dy, weight)
    elif needs_x and dy is not None:
        dx = input_gradient(dy, weight, d_hidden if z is None else None, lora_A)
    elif needs_x and d_hidden is not None and z is None:
        dx = matmul(d_hidden, lora_A)
    return dx, d_weight, d_bias, dz, d_A, d_B


def inferred(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """y where nothing is kept for a backward. x and z are what `matrix_or_row` gives, and y is of the same form."""
    if x.ndim > 1:
        return _outputs(x, weight, bias, z, lora_A, lora_B, scaling)[0]
    y = weight.mv(x) if bias is None else torch.addmv(bias, weight, x)
    return y.addmv_(lora_B, lora_A.mv(z), alpha=scaling)


def matrix_or_row(tensor: Tensor) -> Tensor:
    """The rows of a tensor, a single one as a vector: decoding is bound by calls, and those of a vector cost less."""
    if is_plain(tensor) and tensor.numel() == tensor.shape[-1]:
        return tensor.view(-1)
    return rows(tensor)


def updated(x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """x Wᵀ + b + s · h Bᵀ of matrices."""
    if onednn_pays(x, weight):  # it gives new memory, and what is narrow is added to that
        return linear(x, weight, bias).addmm_(hidden, lora_B.t(), alpha=scaling)
    if bias is None:
        return F.linear(hidden, lora_B).addmm_(x, weight.t(), beta=scaling)
    return torch.addmm(bias, hidden, lora_B.t(), alpha=scaling).addmm_(x, weight.t())


def input_gradient(dy: Tensor, weight: Tensor, g: Tensor | None, lora_A: Tensor) -> Tensor:
    """dy W + g A, or without g the first part."""
    if g is None:
        return matmul(dy, weight)
    if onednn_pays(dy, weight.t()) and not torch.is_grad_enabled():
        return matmul(dy, weight).addmm_(g, lora_A)
    return accumulated(g @ lora_A, dy, weight)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    merge: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """As `reference`, by the formulas above; vmap and forward-mode derivatives go by the reference itself.

    With `merge` it is `merging` instead where that pays and z is x. With `dropout`, a probability, z is what dropout
    makes of x, and `dropped` says what is kept of that.
    """
    mask = redraw = None
    if dropout and (by_reference() or not can_draw(x, dropout)):
        z = F.dropout(x, dropout)
    elif dropout:
        mask, redraw = draw(x, dropout)
        z, scaling = torch.where(mask, x.detach(), 0), scaling / (1 - dropout)
    if by_reference():
        return reference(x, weight, bias, z, lora_A, lora_B, scaling)
    if merge and z is None and merging.pays(x, [lora_A], [lora_B]):
        return merging.linears(x, [weight], [bias], [lora_A], [lora_B], [scaling])[0]
    if needs_backward(x, weight, bias, z, lora_A, lora_B):
        keep = None if mask is None or redraw is not None else rows(mask)
        flat_z = None if z is None else rows(z)
        y = _LoraLinear.apply(keep, redraw, rows(x), weight, bias, flat_z, lora_A, lora_B, scaling)[0]
    else:
        flat = matrix_or_row(x)
        flat_z = flat if z is None else matrix_or_row(z)
        y = inferred(flat, weight, bias, flat_z, lora_A, lora_B, scaling)
    return y.view(*x.shape[:-1], weight.shape[0])


composite(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? z, Tensor lora_A, Tensor lora_B, float scaling,"
    " bool merge=False, float dropout=0.0) -> Tensor",
    lora_linear,
)
