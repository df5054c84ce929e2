"""lora_linears: several linear layers with their LoRA updates, all of one input, as one operator.

    yᵢ = x Wᵢᵀ + bᵢ + sᵢ · hᵢ Bᵢᵀ      h = [h₁ h₂ …] = x Aᵀ,  A the Aᵢ on top of one another

    g  = [dy₁ B₁   dy₂ B₂ …]            s is all layers' scaling (`updates.py` has what is done where these differ)
    dx = Σ dyᵢ Wᵢ + s · g A             dA = s · gᵀ x       dBᵢ = s · dyᵢᵀ hᵢ

So x is read once for all the small products, forward and backward, and dx has one piece of memory in which all products
are summed up. Of the forward pass it keeps x and h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .calls import by_reference, needs_backward, require_values, rows
from .cpu import accumulated, linear, matmul, over_rows, product_with_update, widened_where_slow
from .library import composite
from .lora_linear import inferred, matrix_or_row
from .lora_linear import reference as one
from .updates import by_role, through_updates

Tensors = Sequence[Tensor]
Biases = Sequence[Tensor | None]


def reference(
    x: Tensor, weights: Tensors, biases: Biases, lora_As: Tensors, lora_Bs: Tensors, scalings: Sequence[float]
) -> list[Tensor]:
    """The equations: `lora_linear` of each."""
    each = zip(weights, biases, lora_As, lora_Bs, scalings)
    return [one(x, weight, bias, None, lora_A, lora_B, scaling) for weight, bias, lora_A, lora_B, scaling in each]


class _LoraLinears(torch.autograd.Function):
    """Of matrices: x, then all weights, biases, As and Bs. h is an output, so that second derivatives are right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: tuple[float, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        *outputs, hidden = _outputs(x, scalings, *tensors)
        ctx.scalings = scalings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, hidden, *tensors)
        return *outputs, hidden

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_x, _, *needs = ctx.needs_input_grad
        dx, *found = _gradients(*gradients, *ctx.saved_tensors, ctx.scalings, needs_x, needs)
        return dx, None, *found


@widened_where_slow
def _outputs(x: Tensor, scalings: tuple[float, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The yᵢ, and h."""
    weights, biases, lora_As, lora_Bs = by_role(tensors, len(scalings))
    hidden = linear(x, torch.cat(lora_As))
    parts = hidden.split([lora_A.shape[0] for lora_A in lora_As], -1)
    outputs = [
        product_with_update(x, weight.t(), part, lora_B.t(), bias, scaling)
        for weight, bias, part, lora_B, scaling in zip(weights, biases, parts, lora_Bs, scalings)
    ]
    return *outputs, hidden


@widened_where_slow
def _gradients(*given: Any) -> tuple[Tensor | None, ...]:
    """Of x, then of all weights, biases, As and Bs: those that are needed.

    `given` are the dyᵢ and the gradient of h, x, h, what `by_role` tells apart, scalings, and what is needed: the
    gradient of x, and which of the others.
    """
    *tensors, scalings, needs_x, needs = given
    count = len(scalings)
    dys, (d_hidden, x, hidden), tensors = tensors[:count], tensors[count : count + 3], tensors[count + 3 :]
    weights, _, lora_As, lora_Bs = by_role(tensors, count)
    needs_weights, needs_biases, needs_As, needs_Bs = by_role(needs, count)
    ranks = [lora_A.shape[0] for lora_A in lora_As]
    g, scaling = through_updates(dys, x, scalings, lora_Bs)
    if d_hidden is not None:
        g, scaling = torch.add(d_hidden, g, alpha=scaling), 1.0
    products = [(dy, weight) for dy, weight in zip(dys, weights) if dy is not None]
    dx = _sum_of_products(products, g, torch.cat(lora_As), scaling) if needs_x else None
    d_As = over_rows(g, x, scaling).split(ranks) if any(needs_As) else [None] * count
    if d_hidden is None:  # an output that nobody used has no gradient, which is not one of zeros
        d_As = [None if dy is None else d_A for dy, d_A in zip(dys, d_As)]
    d_weights = [_gradient(dy, x) if needs else None for needs, dy in zip(needs_weights, dys)]
    d_biases = [dy.sum(0) if needs and dy is not None else None for needs, dy in zip(needs_biases, dys)]
    parts = hidden.split(ranks, -1)
    d_Bs = [_gradient(dy, part, s) if needs else None for needs, dy, part, s in zip(needs_Bs, dys, parts, scalings)]
    return dx, *d_weights, *d_biases, *d_As, *d_Bs


def _gradient(dy: Tensor | None, x: Tensor, scaling: float = 1.0) -> Tensor | None:
    return None if dy is None else over_rows(dy, x, scaling)


def _sum_of_products(products: list[tuple[Tensor, Tensor]], g: Tensor, lora_A: Tensor, scaling: float) -> Tensor:
    """Σ dyᵢ Wᵢ + s · g A, in one piece of memory."""
    if not products:
        return matmul(g, lora_A, scaling)
    total = product_with_update(*products[0], g, lora_A, scaling=scaling)
    for dy, weight in products[1:]:
        total = accumulated(total, dy, weight)
    return total


def lora_linears(
    x: Tensor,
    weights: Tensors,
    biases: Biases,
    lora_As: Tensors,
    lora_Bs: Tensors,
    scalings: Sequence[float],
) -> list[Tensor]:
    """yᵢ = x Wᵢᵀ + bᵢ + sᵢ · (x Aᵢᵀ) Bᵢᵀ, each (…, outᵢ): `lora_linear` of each, with x read once.

    x is (…, in), a weight (outᵢ, in), a bias (outᵢ,) or None, an A (rᵢ, in), a B (outᵢ, rᵢ); dtype, device,
    derivatives and errors are as with `lora_linear`.
    """
    if by_reference():
        return reference(x, weights, biases, lora_As, lora_Bs, scalings)
    require_values(lora_As[0], x)
    tensors = *weights, *biases, *lora_As, *lora_Bs
    if needs_backward(x, *tensors):
        outputs = _LoraLinears.apply(rows(x), tuple(scalings), *tensors)[:-1]
    else:
        flat = matrix_or_row(x)
        each = zip(weights, biases, lora_As, lora_Bs, scalings)
        outputs = tuple(inferred(flat, w, bias, flat, lora_A, lora_B, s) for w, bias, lora_A, lora_B, s in each)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


composite(
    "lora_linears(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_As, Tensor[] lora_Bs, float[] scalings)"
    " -> Tensor[]",
    lora_linears,
)
