"""RandLoRA (Albert et al., 2025, arXiv 2502.00987, section 4): a full-rank update, as a sum of random ones of low rank.

    y = x Wᵀ + b + s · x ΔWᵀ,    ΔW = Σ_j B_j Λ_j A Γ_j        j = 1 … n, so that n · r is the smaller size of W

A and B_j are random and stay so: one pair for all sites, A (r, 1, smaller) and B (larger, n, r), of which a site has
the first parts. Λ_j and Γ_j are diagonal and train: λ (r, n), 0 at first, and γ (n, smaller). They belong to the
smaller side of W. The n products are one: their factors stand beside one another, (n · r, smaller) and (larger, n · r).

As in PEFT the former stand by the rows of A and then j, the latter by j and then the columns of B_j: so ΔW pairs them
otherwise than the paper does, which makes no difference to random ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import AdapterConfig, is_number, require, require_bias, require_counts, require_dropouts
from ..low_rank import LowRank
from ..site import Selection, Site
from .kind import Kind, Operands, Spec, require_linear

aten = torch.ops.aten


def _check(config: RandLoraConfig) -> None:
    require_counts(config, "r")
    require(is_number(config.randlora_alpha), "randlora_alpha", config.randlora_alpha, "a number")
    require_dropouts(config, "randlora_dropout")
    require_bias(config, "randlora_only")


@dataclass(frozen=True, kw_only=True)
class RandLoraConfig(AdapterConfig):
    """The fields of `peft.RandLoraConfig`, with its names and defaults.

    `projection_prng_key` is the seed of A and B, which are ternary if `sparse` or `very_sparse`; without
    `save_projection` files do not have them, and they are drawn again where an adapter is loaded. Raises `ConfigError`
    for a value of the wrong type or range, naming the field.
    """

    peft_type: str = "RANDLORA"
    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: float = 640
    bias: str = "none"
    init_weights: bool = True

    checks = (_check,)
    absent = ("exclude_modules",)


class RandLora(Kind):
    """The RandLoRA kind; see the module's docstring for its equation."""

    config = RandLoraConfig
    additive = True

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        a, b = _factors(at)
        update = at.wide(at.narrow(at.dropout(x, at.config.randlora_dropout), a), b)
        return aten.add.Tensor(y, aten.mul.Tensor(update, at.scaling))

    def delta(self, name: str, at: Operands) -> LowRank | Tensor:
        return at.product(*_factors(at)) * at.scaling

    def numbers(self, site: Site, config: RandLoraConfig) -> dict[str, float]:
        return {"scaling": config.randlora_alpha / config.r}

    def check(self, site: Site, config: RandLoraConfig) -> None:
        require_linear(site, config)

    def tensors(self, site: Site, config: RandLoraConfig) -> dict[str, Spec]:
        smaller = min(site.in_features, site.out_features)
        count = math.ceil(smaller / config.r)
        return {
            "factors": Spec("randlora_lambda", (config.r, count)),
            "gains": Spec("randlora_gamma", (count, smaller)),
        }

    def shared(self, selection: Selection, config: RandLoraConfig) -> dict[str, Spec]:
        sizes = max(site.in_features for site in selection), max(site.out_features for site in selection)
        count, saved = math.ceil(min(sizes) / config.r), config.save_projection
        return {
            "randlora_A": Spec("randlora_A", (config.r, 1, min(sizes)), fixed=True, saved=saved),
            "randlora_B": Spec("randlora_B", (max(sizes), count, config.r), fixed=True, saved=saved),
        }

    def draw(self, config: RandLoraConfig, tensors: Mapping[str, Tensor]) -> None:
        rng = torch.Generator().manual_seed(config.projection_prng_key)
        a, b = tensors["randlora_A"], tensors["randlora_B"]
        if config.sparse or config.very_sparse:
            sparsity = math.sqrt(a.shape[2]) if config.very_sparse else 3.0
            bases = [_ternary(torch.rand(each.shape, generator=rng), sparsity) for each in (a, b)]
        else:
            one, *others = (
                nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=rng)
                for shape in [a.shape, *[(b.shape[0], 1, b.shape[2])] * b.shape[1]]
            )
            bases = [one, torch.cat(others, 1)]
        for tensor, basis in zip((a, b), bases):
            tensor.copy_(basis / basis.std())

    def init(
        self,
        site: Site,
        config: RandLoraConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        factors, gains = tensors["factors"], tensors["gains"]
        if config.init_weights:
            factors.zero_()
            gains.fill_(1 / max(gains.shape))
        else:
            nn.init.normal_(factors, generator=rng)
            gains.fill_(1 / max(site.in_features, site.out_features))


def _ternary(uniform: Tensor, sparsity: float) -> Tensor:
    """-1 and 1 with a probability of 1 / (2 · sparsity) each, else 0, of numbers from 0 to 1."""
    tail = 1 / (2 * sparsity)
    return (uniform > 1 - tail).float() - (uniform < tail).float()


def _factors(at: Operands) -> tuple[Any, Any]:
    """The narrow weight (n · r, in) and the wide one (out, n · r)."""
    inputs, outputs = at.site.in_features, at.site.out_features
    smaller, larger = min(inputs, outputs), max(inputs, outputs)
    count = math.ceil(smaller / at.config.r)
    a = aten.slice.Tensor(at.randlora_A, 2, 0, smaller)
    a = aten.mul.Tensor(aten.mul.Tensor(a, aten.unsqueeze.default(at.factors, 2)), at.gains)
    b = aten.slice.Tensor(aten.slice.Tensor(at.randlora_B, 0, 0, larger), 1, 0, count)
    a, b = aten.flatten.using_ints(a, 0, 1), aten.flatten.using_ints(b, 1)
    return (a, b) if smaller == inputs else (aten.t.default(b), aten.t.default(a))
