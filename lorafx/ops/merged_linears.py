"""merged_linears: linear layers of one input with W + ΔW made on the fly, where that takes fewer multiplications.

    yᵢ = x W'ᵢᵀ + bᵢ        W'ᵢ = Wᵢ + sᵢ · Bᵢ Aᵢ

    dx = Σ dyᵢ W'ᵢ          dA = [s₁ · dy₁ B₁  s₂ · dy₂ B₂ …]ᵀ x,  the dAᵢ on top of one another
                            dBᵢ = sᵢ · dyᵢᵀ hᵢ,  h = [h₁ h₂ …] = x Aᵀ,  A the Aᵢ on top of one another

(RunLoRA, Cherniuk et al., 2023, arXiv 2312.03415.) Of the forward pass it keeps x alone: backward makes W' and h again.
W' is rounded to the dtype of W, so y and dx lose the part of ΔW that is below half a step of W: up to 2⁻⁸ of W in
bfloat16 and 2⁻¹¹ in float16, unless products go by way of float32 (`ops/cpu`). dA and dB are those of `lora_linear`.

Multiplications of one site besides the product with W, for T rows of x, k in features, n out features and rank r:

        through h (`lora_linear`)              with W'
    y   T r k + T r n                          n r k
    dx  T r k + T r n                          n r k
    dA  T r k, and dy B is there from dx       T r k + T r n
    dB  T r n, and h is there from y           T r k + T r n

So W' pays in inference where T > n k / (n + k), and in training where T > 2 n k / (n + k), since dB needs an h that y
has no use for. Without dx, as in a first layer, it pays where T > k. For sites that share x the sums of the columns are
compared. Choosing apart for y (T > k) and dx (T > n) would save nothing more where k = n, and little elsewhere. What is
done once for each element (adding, scaling) is not counted: it is 1 / r of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ..torch_private.tensors import is_compiled_now
from .calls import needs_backward, rows
from .cpu import accumulated, linear, matmul, over_rows, widened_where_slow

Flat = Sequence[Any]  # weight (out, in), bias (out,) or None, A (r, in) and B (out, r) of each site in turn


def pays(x: Tensor, lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor]) -> bool:
    """Whether W' takes fewer multiplications than h, for this x (…, in) and the gradients that will be asked for."""
    needs_x, needs_A, needs_B = needs_backward(x), needs_backward(*lora_As), needs_backward(*lora_Bs)
    features_in, spent, saved_a_row = x.shape[-1], 0, 0
    for lora_A, lora_B in zip(lora_As, lora_Bs):
        rank, features_out = lora_A.shape[0], lora_B.shape[0]
        spent += (1 + needs_x) * features_out * rank * features_in
        saved_a_row += rank * (features_in + features_out)  # y
        saved_a_row += rank * needs_x * (features_in + (0 if needs_A else features_out))  # dx; dA needs dy B anyway
        saved_a_row -= rank * needs_B * features_in
    cheaper = math.prod(x.shape[:-1]) * saved_a_row > spent
    if isinstance(cheaper, bool):
        return cheaper
    # A compiler puts a guard on the rows, and compiles once for either answer. Who asks for shapes only (fake tensors
    # while a pass runs) is told no, without a guard.
    return is_compiled_now() and guard_or_false(cheaper)


class _Merging(torch.autograd.Function):
    """x is a matrix here, and so are the outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: tuple[float, ...], *tensors: Any) -> tuple[Tensor, ...]:
        ctx.scalings = scalings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *tensors)
        return _outputs(x, scalings, *tensors)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        """A site whose output nobody used has no dy and gets no gradients."""
        dx, *gradients = _gradients(*dys, *ctx.saved_tensors, ctx.needs_input_grad, ctx.scalings)
        return dx, None, *gradients


@widened_where_slow
def _outputs(x: Tensor, scalings: tuple[float, ...], *tensors: Any) -> tuple[Tensor, ...]:
    return tuple(
        linear(x, torch.addmm(weight, lora_B, lora_A, alpha=scaling), bias)
        for (weight, bias, lora_A, lora_B), scaling in zip(_by_site(tensors), scalings)
    )


@widened_where_slow
def _gradients(*given: Any) -> tuple[Tensor | None, ...]:
    """Of x, then of each site's tensors. `given` are the dyᵢ, x and these tensors, what is needed, and scalings."""
    *tensors, (needs_x, _, *needs), scalings = given
    dys, x, tensors = tensors[: len(scalings)], tensors[len(scalings)], tensors[len(scalings) + 1 :]
    sites = zip(dys, scalings, _by_site(tensors), _by_site(needs))
    used = [(dy, scaling, *of_site, needed) for dy, scaling, of_site, needed in sites if dy is not None]
    d_As, hidden = _stacked(x, used)
    dx, found = None, []
    for (dy, scaling, weight, _, lora_A, lora_B, needed), d_A, part in zip(used, d_As, hidden):
        if needs_x:  # scaled otherwise than in forward, or a compiler would see that W' is the same and keep it
            merged = torch.addmm(weight, lora_B * scaling, lora_A)
            dx = matmul(dy, merged) if dx is None else accumulated(dx, dy, merged)
        d_weight = over_rows(dy, x) if needed[0] else None
        d_bias = dy.sum(0) if needed[1] else None
        d_B = over_rows(dy, part) * scaling if needed[3] else None
        found.append((d_weight, d_bias, d_A if needed[2] else None, d_B))
    gradients = iter(found)
    return dx, *(gradient for dy in dys for gradient in (_NONE if dy is None else next(gradients)))


_NONE = (None,) * 4


def _stacked(x: Tensor, used: list[tuple[Any, ...]]) -> tuple[Sequence[Tensor | None], Sequence[Any]]:
    """The dAᵢ and the hᵢ of sites, if any is needed: x is read once for all dAᵢ, and once for all hᵢ."""
    lora_As = [lora_A for *_, lora_A, _, _ in used]
    ranks, nothing = [lora_A.shape[0] for lora_A in lora_As], [None] * len(used)
    d_As: Sequence[Tensor | None] = nothing
    hidden: Sequence[Any] = nothing
    if any(needed[2] for *_, needed in used):
        through = [matmul(dy, lora_B) * scaling for dy, scaling, *_, lora_B, _ in used]
        d_As = over_rows(torch.cat(through, -1), x).split(ranks)
    if any(needed[3] for *_, needed in used):
        hidden = linear(x, torch.cat(lora_As)).split(ranks, -1)
    return d_As, hidden


def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:
    """yᵢ = x (Wᵢ + sᵢ · Bᵢ Aᵢ)ᵀ + bᵢ, each (…, outᵢ): arguments, dtypes and devices as `lora_linears` has them."""
    flat = [tensor for of_site in zip(weights, biases, lora_As, lora_Bs) for tensor in of_site]
    run = _Merging.apply if needs_backward(x, *flat) else _outputs
    outputs = run(rows(x), tuple(scalings), *flat)
    return [output.view(*x.shape[:-1], output.shape[-1]) for output in outputs]


def _by_site(flat: Flat) -> list[Flat]:
    return [flat[place : place + 4] for place in range(0, len(flat), 4)]
