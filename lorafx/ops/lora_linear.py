"""lora_linear: a linear layer and its LoRA update as one operator with a backward of its own.

    y  = x Wᵀ + b + s · h Bᵀ,   h = z Aᵀ            z is x, or what dropout made of it

    dx = dy W + s · g A,        g = dy B            (the second part to dz where z is not x)
    dA = s · gᵀ z               dB = s · dyᵀ h

s is a factor within a product's kernel, never a kernel of its own. Of the forward pass it keeps x, z (or what makes z
of x again, see `dropout`) and h, where autograd keeps what each product was given. y and dx are each written in one
piece of memory, to which the second product is added.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .calls import by_reference, is_plain, needs_backward, require_values, rows
from .cpu import accumulated, linear, matmul, over_rows, product_with_update, widened_where_slow
from .dropout import Redraw, can_draw, draw
from .library import composite


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """The equation, in operators of torch."""
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x if z is None else z, lora_A), lora_B)


class Operands(NamedTuple):
    """One value for each tensor that the operator is given: whether its gradient is needed, or that gradient."""

    x: Any
    weight: Any
    bias: Any
    z: Any
    lora_A: Any
    lora_B: Any


class _LoraLinear(torch.autograd.Function):
    """Gives y and h, of matrices. Without a `setup_context`, for which torch inspects forward's signature each call."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        z: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        mask: Tensor | None,
        redraw: Redraw | None,
    ) -> tuple[Tensor, Tensor]:
        """With a mask, given or to be drawn again, z is what it leaves of x, and is not kept."""
        y, hidden = _outputs(x, weight, bias, z, lora_A, lora_B, scaling)
        ctx.scaling, ctx.redraw = scaling, redraw
        ctx.set_materialize_grads(False)
        kept = z if mask is None and redraw is None else None
        ctx.save_for_backward(mask, x, weight, kept, lora_A, lora_B, hidden)
        return y, hidden

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_hidden: Tensor | None) -> tuple[Tensor | None, ...]:
        """`d_hidden` is there in a second derivative alone: h is an output so that one can be taken."""
        mask, x, weight, z, lora_A, lora_B, hidden = ctx.saved_tensors
        if ctx.redraw is not None:
            mask = ctx.redraw(x)
        if mask is not None:
            z = torch.where(mask, x, 0)
        needs = Operands(*ctx.needs_input_grad[:6])
        found = _gradients(dy, d_hidden, x, weight, z, lora_A, lora_B, hidden, mask, ctx.scaling, needs)
        return *found, None, None, None


@widened_where_slow
def _outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """y and h of matrices."""
    hidden = linear(x if z is None else z, lora_A)
    return product_with_update(x, weight.t(), hidden, lora_B.t(), bias, scaling), hidden


@widened_where_slow
def _gradients(
    dy: Tensor | None,
    d_hidden: Tensor | None,
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    hidden: Tensor,
    mask: Tensor | None,
    scaling: float,
    needs: Operands,
) -> Operands:
    """The gradients that are needed, None for the others. With a mask z is what it leaves of x."""
    g = dx = dz = d_weight = d_bias = d_A = d_B = None
    if dy is not None:
        d_weight = over_rows(dy, x) if needs.weight else None
        d_bias = dy.sum(0) if needs.bias else None
        d_B = over_rows(dy, hidden, scaling) if needs.lora_B else None
        g = matmul(dy, lora_B)
    if d_hidden is not None:
        g, scaling = d_hidden if g is None else torch.add(d_hidden, g, alpha=scaling), 1.0
    if g is not None:
        d_A = over_rows(g, x if z is None else z, scaling) if needs.lora_A else None
        dz = matmul(g, lora_A, scaling) if needs.z else None
    if needs.x and g is not None and mask is not None:
        through = torch.where(mask, matmul(g, lora_A, scaling), 0)
        dx = through if dy is None else accumulated(through, dy, weight)
    elif needs.x and dy is not None and g is not None:
        dx = product_with_update(dy, weight, g, lora_A, scaling=scaling) if z is None else matmul(dy, weight)
    elif needs.x and g is not None and z is None:
        dx = matmul(g, lora_A, scaling)
    return Operands(x=dx, weight=d_weight, bias=d_bias, z=dz, lora_A=d_A, lora_B=d_B)


def inferred(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
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


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """y = x Wᵀ + b + s · (z Aᵀ) Bᵀ (LoRA: Hu et al., 2021, arXiv 2106.09685), of shape (…, out).

    x and z are (…, in), `weight` is W (out, in), `bias` b (out,), `lora_A` (r, in), `lora_B` (out, r), `scaling` s:
    tensors of one floating dtype on one device, any. z is x where it is None. With `dropout`, a probability, z is None
    and becomes what dropout leaves of x; `ops/dropout.py` says what is kept of that.

    All derivatives can be taken, also second ones; vmap and forward-mode derivatives go by the equation's own
    operators. Sizes or dtypes that do not fit are torch's RuntimeError.
    """
    require_values(lora_A, x)
    mask = redraw = None
    if dropout and (by_reference() or not can_draw(x, dropout)):
        z = F.dropout(x, dropout)
    elif dropout:
        mask, redraw = draw(x, dropout)
        z, scaling = torch.where(mask, x.detach(), 0), scaling / (1 - dropout)
    if by_reference():
        return reference(x, weight, bias, z, lora_A, lora_B, scaling)
    if needs_backward(x, weight, bias, z, lora_A, lora_B):
        flat_z = None if z is None else rows(z)
        kept = None if mask is None or redraw is not None else rows(mask)
        y = _LoraLinear.apply(rows(x), weight, bias, flat_z, lora_A, lora_B, scaling, kept, redraw)[0]
    else:
        flat = matrix_or_row(x)
        y = inferred(flat, weight, bias, flat if z is None else matrix_or_row(z), lora_A, lora_B, scaling)
    return y.view(*x.shape[:-1], weight.shape[0])


composite(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? z, Tensor lora_A, Tensor lora_B, float scaling,"
    " float dropout=0.0) -> Tensor",
    lora_linear,
)
