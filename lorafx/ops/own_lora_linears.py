"""own_lora_linears: linear layers that run their own code, with their LoRA updates, all of one input, as one operator.

    yᵢ = layerᵢ(x) + sᵢ · hᵢ Bᵢᵀ       h = [h₁ h₂ …] = z Aᵀ,  A the Aᵢ on top of one another;  z is x, or what
                                        dropout made of it

    g  = [dy₁ B₁   dy₂ B₂ …]            s is all layers' scaling (`updates.py` has what is done where these differ)
    dx = Σ dyᵢ Wᵢ + s · g A             dA = s · gᵀ z       dBᵢ = s · dyᵢᵀ hᵢ        (g A to dz where z is not x)

It is for layers whose storage knows that their gradient is a product with W (`OwnLayer.factor`), as those of
bitsandbytes. Updates are added in the memory of what the layer gave, and dx is one piece of memory in which all
products are summed up. Wᵢ is there in backward alone, one at a time, for as long as its product takes. Of the forward
pass it keeps x, z (or what makes z of x again, see `dropout`) and h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .calls import by_reference, is_plain, needs_backward, rows
from .cpu import accumulated, linear, matmul
from .dropout import Redraw, can_draw, draw
from .library import composite
from .own_forward import factor_of, own_forward
from .updates import by_role, of_updates, through_updates

Tensors = Sequence[Tensor]
Biases = Sequence[Tensor | None]


def reference(
    x: Tensor,
    biases: Biases,
    numbers: Tensors,
    features: Sequence[int],
    z: Tensor | None,
    lora_As: Tensors,
    lora_Bs: Tensors,
    scalings: Sequence[float],
) -> list[Tensor]:
    """The equations: the layers' own forward, and operators of torch."""
    return [
        own_forward(x, None, bias, number, size, None)
        + scaling * F.linear(F.linear(x if z is None else z, lora_A), lora_B)
        for bias, number, size, lora_A, lora_B, scaling in zip(biases, numbers, features, lora_As, lora_Bs, scalings)
    ]


class _OwnLoraLinears(torch.autograd.Function):
    """Of matrices: x and z, then all numbers, biases, As and Bs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        mask: Tensor | None,
        redraw: Redraw | None,
        features: tuple[int, ...],
        scalings: tuple[float, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """With a mask, given or to be drawn again, z is what it leaves of x, and is not kept."""
        *outputs, hidden = _outputs(x, z, features, scalings, *tensors)
        ctx.features, ctx.scalings, ctx.redraw, ctx.apart = features, scalings, redraw, z is not None
        ctx.set_materialize_grads(False)
        kept = z if mask is None and redraw is None else None
        ctx.save_for_backward(mask, x, kept, hidden, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        """A layer whose output nobody used has no dy, and its tensors get no gradients.

        All that does not go into dx comes after it: then no dense weight is there at the same time.
        """
        mask, x, z, hidden, *tensors = ctx.saved_tensors
        mask = mask if ctx.redraw is None else ctx.redraw(x)
        needs_x, needs_z, _, _, _, _, *needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for a second derivative, which the equations have
            return _derivable(dys, x, z if mask is None else torch.where(mask, x, 0), ctx, tensors)
        numbers, biases, lora_As, lora_Bs = by_role(tensors, len(dys))
        _, *needs = by_role(needs, len(dys))
        g, scaling = through_updates(dys, x, ctx.scalings, lora_Bs)
        through = None
        if needs_z or (needs_x and (mask is not None or not ctx.apart)):
            through = matmul(g, torch.cat(lora_As), scaling)
        through = through if mask is None or through is None else torch.where(mask, through, 0)
        dx = None
        if needs_x:
            dx = _through_layers(dys, x, biases, numbers, ctx.features, None if needs_z else through)
        z = z if mask is None else torch.where(mask, x, 0)
        found = of_updates(dys, x if z is None else z, hidden, g, ctx.scalings, lora_As, needs)
        return dx, through if needs_z else None, None, None, None, None, *[None] * len(dys), *found


def _outputs(
    x: Tensor, z: Tensor | None, features: Sequence[int], scalings: Sequence[float], *tensors: Tensor | None
) -> tuple[Tensor, ...]:
    """The yᵢ, and h."""
    numbers, biases, lora_As, lora_Bs = by_role(tensors, len(features))
    hidden = linear(x if z is None else z, lora_As[0] if len(lora_As) == 1 else torch.cat(lora_As))
    parts = hidden.split([lora_A.shape[0] for lora_A in lora_As], -1)
    outputs = [
        own_forward(x, None, bias, number, size, None).addmm_(part, lora_B.t(), alpha=scaling)
        for bias, number, size, part, lora_B, scaling in zip(biases, numbers, features, parts, lora_Bs, scalings)
    ]
    return *outputs, hidden


def _through_layers(
    dys: Sequence[Tensor | None],
    x: Tensor,
    biases: Biases,
    numbers: Tensors,
    features: Sequence[int],
    total: Tensor | None,
) -> Tensor | None:
    """Σ dyᵢ Wᵢ, added to `total` in its memory."""
    for dy, bias, number, size in zip(dys, biases, numbers, features):
        if dy is not None:
            total = _through_layer(dy, x, bias, number, size, total)
    return total


def _through_layer(
    dy: Tensor, x: Tensor, bias: Tensor | None, number: Tensor, size: int, total: Tensor | None
) -> Tensor:
    """dy W, added to `total`; W is gone when it returns."""
    factor = factor_of(number, x) if is_plain(dy) and is_plain(number) else None
    if factor is not None and factor.dtype == dy.dtype and total is not None:
        return accumulated(total, dy, factor)
    if factor is None:  # these are a compiler's tensors
        dx = torch.ops.lorafx.hidden_backward(dy, x, bias, number, size, None)[0]
    else:
        dx = matmul(dy.to(factor.dtype), factor).to(dy.dtype)
    return dx if total is None else total.add_(dx)


def _derivable(
    dys: Sequence[Tensor | None], x: Tensor, z: Tensor | None, ctx: Any, tensors: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """The gradients as a function that has derivatives itself."""
    numbers, biases, lora_As, lora_Bs = by_role(tensors, len(dys))
    ys = reference(x, biases, numbers, ctx.features, z, lora_As, lora_Bs, ctx.scalings)
    used = [(y, dy) for y, dy in zip(ys, dys) if dy is not None]
    given = (x, z, None, None, None, None, *tensors)
    wanted = [place for place, needed in enumerate(ctx.needs_input_grad) if needed]
    found = torch.autograd.grad(
        [y for y, _ in used], [given[at] for at in wanted], [dy for _, dy in used], create_graph=True, allow_unused=True
    )
    gradients = dict(zip(wanted, found))
    return tuple(gradients.get(place) for place in range(len(given)))


def own_lora_linears(
    x: Tensor,
    biases: Biases,
    numbers: Tensors,
    features: Sequence[int],
    z: Tensor | None,
    lora_As: Tensors,
    lora_Bs: Tensors,
    scalings: Sequence[float],
    dropout: float = 0.0,
) -> list[Tensor]:
    """yᵢ = layerᵢ(x) + sᵢ · (z Aᵢᵀ) Bᵢᵀ, each (…, featuresᵢ), of the own layers of these numbers.

    x and z are (…, in), a bias (outᵢ,) or None, in the place of the layer's own, an A (rᵢ, in), a B (outᵢ, rᵢ), all of
    one floating dtype on one device. z is x where it is None; with `dropout`, a probability, it is None and becomes
    what dropout leaves of x.

    All derivatives that the layers have. vmap and forward-mode derivatives go by `reference`. Raises `AdapterError` as
    `own_forward` does; sizes or dtypes that do not fit are torch's RuntimeError.
    """
    mask = redraw = None
    if dropout and (by_reference() or not can_draw(x, dropout)):
        z = F.dropout(x, dropout)
    elif dropout:
        mask, redraw = draw(x, dropout)
        z, scalings = torch.where(mask, x.detach(), 0), [scaling / (1 - dropout) for scaling in scalings]
    if by_reference():
        return reference(x, biases, numbers, features, z, lora_As, lora_Bs, scalings)
    flat_z, tensors = None if z is None else rows(z), (*numbers, *biases, *lora_As, *lora_Bs)
    if needs_backward(x, z, *biases, *lora_As, *lora_Bs):
        kept = None if mask is None or redraw is not None else rows(mask)
        outputs = _OwnLoraLinears.apply(rows(x), flat_z, kept, redraw, tuple(features), tuple(scalings), *tensors)
    else:
        outputs = _outputs(rows(x), flat_z, features, scalings, *tensors)[:-1]
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


def own_lora_linear(
    x: Tensor,
    bias: Tensor | None,
    number: Tensor,
    features: int,
    z: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """y = layer(x) + s · (z Aᵀ) Bᵀ: `own_lora_linears` of one layer."""
    return own_lora_linears(x, [bias], [number], [features], z, [lora_A], [lora_B], [scaling], dropout)[0]


composite(
    "own_lora_linears(Tensor x, Tensor?[] biases, Tensor[] numbers, SymInt[] features, Tensor? z, Tensor[] lora_As,"
    " Tensor[] lora_Bs, float[] scalings, float dropout=0.0) -> Tensor[]",
    own_lora_linears,
)
composite(
    "own_lora_linear(Tensor x, Tensor? bias, Tensor number, SymInt features, Tensor? z, Tensor lora_A, Tensor lora_B,"
    " float scaling, float dropout=0.0) -> Tensor",
    own_lora_linear,
)
