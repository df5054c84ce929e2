"""LoHa: a Hadamard product of two low-rank matrices (FedPara: Hyeon-Woo et al., 2022, arXiv 2108.06098, section 2).

    ΔW = (A₁ B₁) ∘ (A₂ B₂)        A (out, r), B (r, in); of a convolution B (r, in · kernel)
       = A B                      A (out, r²): A₁ₒᵢ A₂ₒⱼ,  B (r², in): B₁ᵢₙ B₂ⱼₙ

So an update of rank up to r² goes through r² features where these cost less than ΔW does; else ΔW is made. With
`use_effective_conv2d`, each factor of a convolution's ΔW is Σᵢⱼ Tᵢⱼₖ Aᵢₒ Bⱼₙ: A (r, out), B (r, in), T (r, r, kernel).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import require_flags
from ..low_rank import LowRank
from ..site import Site
from .kind import Operands, Spec
from .lora import rank
from .lycoris import Lycoris, LycorisConfig, core_shape, has_core, kaiming, with_core

aten = torch.ops.aten


def _check(config: LoHaConfig) -> None:
    require_flags(config, "init_weights")


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(LycorisConfig):
    """What to adapt and how: the fields of `peft.LoHaConfig`, with its names and defaults."""

    peft_type: str = "LOHA"

    checks = (*LycorisConfig.checks, _check)


class LoHa(Lycoris):
    """The LoHa kind; see the module's docstring for its equation."""

    config = LoHaConfig

    def update(self, x: Any, at: Operands) -> Any:
        site = at.site
        rows, columns = site.out_features, _columns(site)
        few = rank(site, at.config) ** 2 * (rows + columns) < rows * columns
        if not few or site.groups > 1 or has_core(site, at.config):
            return at.full(x, aten.view.default(_change(at), _shape(site)))
        b, a = _joined(at)
        spatial = site.weight_shape[2:]
        if spatial:
            b = aten.view.default(b, [-1, *site.weight_shape[1:]])
            a = aten.view.default(a, [rows, -1, *[1] * len(spatial)])
        return at.wide(at.narrow(x, b), a)

    def rescales(self, config: LoHaConfig) -> bool:
        return True

    def sized(self, config: LoHaConfig) -> tuple[str, ...]:
        return "r", "alpha", "rank_pattern", "alpha_pattern"

    def of_rank(self, config: LoHaConfig, r: int) -> LoHaConfig:
        return config.replace(r=r, rank_pattern={})

    def delta(self, name: str, at: Operands) -> LowRank | Tensor:
        if has_core(at.site, at.config):
            return at.like_weight(_change(at)) * at.scaling
        b, a = _joined(at)
        return at.product(b, a) * at.scaling

    def tensors(self, site: Site, config: LoHaConfig) -> dict[str, Spec]:
        r, rows = rank(site, config), site.out_features
        a, b = (rows, r), (r, _columns(site))
        core = {}
        if has_core(site, config):
            a, b = (r, rows), (r, site.weight_shape[1])
            core = {f"t{i}": Spec(f"hada_t{i}", core_shape(site, r)) for i in (1, 2)}
        return {f"{n}{i}": Spec(f"hada_w{i}_{n}", s) for i in (1, 2) for n, s in (("a", a), ("b", b))} | core

    def init(
        self,
        site: Site,
        config: LoHaConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        for tensor in tensors.values():
            kaiming(tensor, rng)
        if config.init_weights:
            tensors["b2"].zero_()


def _columns(site: Site) -> int:
    """Of ΔW as a matrix."""
    return math.prod(_shape(site)[1:])


def _shape(site: Site) -> tuple[int, ...]:
    """Of the dense weight, or of its transpose where it is stored (in, out)."""
    return site.weight_shape[::-1] if site.reading.transposed else site.weight_shape


def _joined(at: Operands) -> tuple[Any, Any]:
    """B (r², columns) and A (out, r²), whose product is ΔW."""
    b = aten.mul.Tensor(aten.unsqueeze.default(at.b1, 1), aten.unsqueeze.default(at.b2, 0))
    a = aten.mul.Tensor(aten.unsqueeze.default(at.a1, 2), aten.unsqueeze.default(at.a2, 1))
    return aten.flatten.using_ints(b, 0, 1), aten.flatten.using_ints(a, 1)


def _change(at: Operands) -> Any:
    """ΔW as a matrix (out, columns)."""
    if has_core(at.site, at.config):
        return aten.mul.Tensor(with_core(at.t1, at.a1, at.b1), with_core(at.t2, at.a2, at.b2))
    return aten.mul.Tensor(aten.mm.default(at.a1, at.b1), aten.mm.default(at.a2, at.b2))
