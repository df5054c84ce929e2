"""float8_lora_linears: linear layers of one input with their LoRA updates, whose weights are held in float8.

    yᵢ = x̂ Wᵢᵀ + bᵢ + sᵢ · hᵢ Bᵢᵀ      h = [h₁ h₂ …] = z Aᵀ,  A the Aᵢ on top of one another;  z is x, or what
                                       dropout made of it

    g  = [dy₁ B₁   dy₂ B₂ …]           s is all layers' scaling (`updates.py` has what is done where these differ)
    dx = Σ dyᵢ Wᵢ + s · g A            dA = s · gᵀ z       dBᵢ = s · dyᵢᵀ hᵢ        (g A to dz where z is not x)

x̂ is x rounded to float8, once for all layers, and Σ dyᵢ Wᵢ one product of float8 (`ops/float8.py`). Updates are
computed in the dtype of x, which is not rounded for them. Of the forward pass it keeps x (or z) and h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .calls import by_reference, needs_backward, rows
from .cpu import accumulated, linear, matmul
from .float8 import layer, quantised, through
from .float8_linear import reference as base
from .library import composite
from .updates import by_role, of_updates, through_updates

Tensors = Sequence[Tensor]
Biases = Sequence[Tensor | None]


def reference(
    x: Tensor,
    weights: Tensors,
    scales: Tensors,
    biases: Biases,
    z: Tensor | None,
    lora_As: Tensors,
    lora_Bs: Tensors,
    scalings: Sequence[float],
) -> list[Tensor]:
    """The equations in operators of torch. Their derivatives round no gradient."""
    return [
        base(x, weight, scale, bias) + scaling * F.linear(F.linear(x if z is None else z, lora_A), lora_B)
        for weight, scale, bias, lora_A, lora_B, scaling in zip(weights, scales, biases, lora_As, lora_Bs, scalings)
    ]


class _Float8LoraLinears(torch.autograd.Function):
    """Of matrices: x and z, then all weights, scales, biases, As and Bs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor | None, scalings: tuple[float, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        *outputs, hidden = _outputs(x, z, scalings, *tensors)
        ctx.scalings, ctx.reads_x = scalings, z is None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if z is None else z, hidden, *tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        """A layer whose output nobody used has no dy, and its tensors get no gradients."""
        needs_x, needs_z, _, *needs = ctx.needs_input_grad
        z, hidden, *tensors = ctx.saved_tensors
        weights, scales, _, lora_As, lora_Bs = by_role(tensors, len(dys))
        _, _, *needs = by_role(needs, len(dys))
        g, scaling = through_updates(dys, z, ctx.scalings, lora_Bs)
        dx = dz = None
        if needs_x:
            dx = through(*zip(*[used for used in zip(dys, weights, scales) if used[0] is not None]))
            dx = accumulated(dx, g, torch.cat(lora_As), scaling) if ctx.reads_x else dx
        if needs_z:
            dz = matmul(g, torch.cat(lora_As), scaling)
        gradients = of_updates(dys, z, hidden, g, ctx.scalings, lora_As, needs)
        return dx, dz, None, *[None] * 2 * len(dys), *gradients


def _outputs(x: Tensor, z: Tensor | None, scalings: Sequence[float], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The yᵢ, and h."""
    weights, scales, biases, lora_As, lora_Bs = by_role(tensors, len(scalings))
    rounded, hidden = quantised(x), linear(x if z is None else z, torch.cat(lora_As))
    parts = hidden.split([lora_A.shape[0] for lora_A in lora_As], -1)
    outputs = [
        layer(rounded, weight, scale, bias, x).addmm_(part, lora_B.t(), alpha=scaling)
        for weight, scale, bias, part, lora_B, scaling in zip(weights, scales, biases, parts, lora_Bs, scalings)
    ]
    return *outputs, hidden


def float8_lora_linears(
    x: Tensor,
    weights: Tensors,
    scales: Tensors,
    biases: Biases,
    z: Tensor | None,
    lora_As: Tensors,
    lora_Bs: Tensors,
    scalings: Sequence[float],
    dropout: float = 0.0,
) -> list[Tensor]:
    """yᵢ = x̂ (diag(sᵢ) Qᵢ)ᵀ + bᵢ + sᵢ · (z Aᵢᵀ) Bᵢᵀ, each (…, outᵢ): `float8_linear` of each, with its LoRA update.

    x and z are (…, in), a weight (outᵢ, in) of float8_e4m3fn, its scale (outᵢ,) of float32, a bias (outᵢ,) or None, an
    A (rᵢ, in), a B (outᵢ, rᵢ): but for weights and scales of one floating dtype, on one device, any. z is x where it is
    None; with `dropout`, a probability, it is None and becomes what dropout leaves of x.

    First derivatives of all but weights and scales. vmap and forward-mode derivatives go by `reference`. Sizes or
    dtypes that do not fit are torch's RuntimeError.
    """
    if dropout:
        z = F.dropout(x, dropout)
    if by_reference():
        return reference(x, weights, scales, biases, z, lora_As, lora_Bs, scalings)
    flat_z, tensors = None if z is None else rows(z), (*weights, *scales, *biases, *lora_As, *lora_Bs)
    if needs_backward(x, z, *biases, *lora_As, *lora_Bs):
        outputs = _Float8LoraLinears.apply(rows(x), flat_z, tuple(scalings), *tensors)
    else:
        outputs = _outputs(rows(x), flat_z, scalings, *tensors)[:-1]
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


composite(
    "float8_lora_linears(Tensor x, Tensor[] weights, Tensor[] scales, Tensor?[] biases, Tensor? z, Tensor[] lora_As,"
    " Tensor[] lora_Bs, float[] scalings, float dropout=0.0) -> Tensor[]",
    float8_lora_linears,
)
