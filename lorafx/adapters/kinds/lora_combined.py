"""LoRA adapters combined into one: A and B at a site, of a scaling of 1, out of those of several adapters.

linear, ties, …   A = c(sign(wᵢ sᵢ) √|wᵢ sᵢ|, Aᵢ),  B = c(√|wᵢ sᵢ|, Bᵢ)        what PEFT makes of it: the product has
                                                                                 the cross terms Bᵢ Aⱼ too
cat               A = [w₁ s₁ A₁; w₂ s₂ A₂; …],  B = [B₁, B₂, …]                 exactly Σ wᵢ sᵢ Bᵢ Aᵢ
svd, ties_svd, …  B A ≈ c(wᵢ, sᵢ Bᵢ Aᵢ)                                         the nearest of rank r

c combines tensors by weights (`combining.py`). A bias of B is c(wᵢ, sᵢ biasᵢ); PEFT leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import AdapterError, ConfigError
from ..combining import Combination
from ..low_rank import LowRank
from ..room import fill
from .kind import Operands, Spec

Parts = Sequence[tuple[float, Operands]]


def rank_of(ranks: Sequence[int], how: Combination) -> int:
    """The rank of what adapters of these ranks make, as in PEFT; at sites that need less the rest is zero."""
    if how.combination_type == "cat":
        return sum(ranks)
    return (how.svd_rank if how.decomposes else None) or max(ranks)


def combined(parts: Parts, how: Combination, specs: dict[str, Spec], rng: torch.Generator | None) -> dict[str, Tensor]:
    """The tensors at a site, by the names of `specs`, of these adapters with their weights."""
    site = parts[0][1].site
    if how.combination_type == "cat":
        found = _beside(parts, site.groups)
    elif how.decomposes:
        found = _decomposed(parts, how, specs, rng)
    else:
        found = _elementwise(parts, how, rng)
    if "lora_bias" in specs:
        biases = [(weight, at.lora_bias * at.scaling) for weight, at in parts if "lora_bias" in at.tensors]
        found["lora_bias"] = (
            how.combined([bias for _, bias in biases], [weight for weight, _ in biases], rng)
            if biases
            else torch.zeros(specs["lora_bias"].shape, device="cpu")
        )
    tensors = {name: found[name].new_empty(spec.shape) for name, spec in specs.items()}
    for name, tensor in tensors.items():
        fill(tensor, found[name], site.groups)
    return tensors


def _beside(parts: Parts, groups: int) -> dict[str, Tensor]:
    a = [(at.lora_A * weight * at.scaling).unflatten(0, (groups, -1)) for weight, at in parts]
    return {"lora_A": torch.cat(a, 1).flatten(0, 1), "lora_B": torch.cat([at.lora_B for _, at in parts], 1)}


def _elementwise(parts: Parts, how: Combination, rng: torch.Generator | None) -> dict[str, Tensor]:
    ranks = [at.lora_A.shape[0] for _, at in parts]
    if len(set(ranks)) > 1:
        raise AdapterError(
            f"{parts[0][1].site.name}: {how.combination_type!r} combines A with A and B with B, and their ranks there "
            f'are {ranks}; use "cat" or one that ends in svd'
        )
    factors = [weight * at.scaling for weight, at in parts]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors)]  # one side alone has the sign
    a = how.combined([at.lora_A for _, at in parts], signed, rng)
    return {"lora_A": a, "lora_B": how.combined([at.lora_B for _, at in parts], roots, rng)}


def _decomposed(
    parts: Parts, how: Combination, specs: dict[str, Spec], rng: torch.Generator | None
) -> dict[str, Tensor]:
    site = parts[0][1].site
    if site.groups > 1:
        raise ConfigError(
            f"{site.name} is a convolution with groups={site.groups}, where an adapter is no change of the weight that "
            'could be decomposed; use "cat" or "linear"'
        )
    deltas = [_dense(at.product(at.lora_A, at.lora_B)) * at.scaling for _, at in parts]
    delta = how.combined([each.to(parts[0][1].lora_A.dtype) for each in deltas], [weight for weight, _ in parts], rng)
    matrix = delta.flatten(1).t() if site.reading.transposed else delta.flatten(1)
    a, b = how.factors(matrix, specs["lora_A"].shape[0])
    beyond = specs["lora_A"].shape[2:]  # of a convolution's kernel
    return {"lora_A": a.reshape(len(a), -1, *beyond), "lora_B": b.reshape(*b.shape, *[1] * len(beyond))}


def _dense(delta: LowRank | Tensor) -> Tensor:
    return delta.dense() if isinstance(delta, LowRank) else delta
