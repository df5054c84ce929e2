"""HiRA (Huang et al., 2025, ICLR, section 4): a low-rank matrix multiplies the weight, so that the update has W's rank.

    y = x Wᵀ + b + dropout(x) (W ∘ (B A))ᵀ        A (r, in), B (out, r)

W ∘ (B A) is made, for its rank is not low. An embedding looks up rows of both instead: its update is y ∘ (A[x] Bᵀ). In
a convolution A has the base layer's kernel, and B a kernel of size 1. A and B start as LoRA's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..config import AdapterConfig, is_count, require, require_counts, require_dropouts, require_patterns
from ..readings import IN_PROJ
from ..site import Site
from .kind import Kind, Operands, Spec, summed
from .lora import pattern_value

aten = torch.ops.aten


def _check(config: HiraConfig) -> None:
    require_counts(config, "r")
    require_dropouts(config, "hira_dropout")
    fits = isinstance(config.init_weights, bool) or config.init_weights == "gaussian"
    require(fits, "init_weights", config.init_weights, 'True, False or "gaussian"')
    require_patterns(config, "rank_pattern", is_count, "positive ints")


@dataclass(frozen=True, kw_only=True)
class HiraConfig(AdapterConfig):
    """The fields of `peft.HiraConfig`, with its names and defaults.

    Raises `ConfigError` for a value of the wrong type or range, naming the field.
    """

    peft_type: str = "HIRA"
    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    checks = (_check,)
    null_is_default = ("rank_pattern",)


class Hira(Kind):
    """The HiRA kind; see the module's docstring for its equation."""

    config = HiraConfig
    reads_weight = True

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        if at.site.reading.lookup:
            factor = at.wide(aten.embedding.default(aten.t.default(at.hira_A), x), at.hira_B)
            return aten.add.Tensor(y, aten.mul.Tensor(y, factor))
        weight = aten.mul.Tensor(aten.type_as.default(at.matrix(at.weight), at.hira_A), _product(at))
        if not at.site.reading.matrix:
            weight = aten.view.default(weight, at.site.weight_shape)
        return aten.add.Tensor(y, at.full(at.dropout(x, at.config.hira_dropout), weight))

    def fused(self, x: Tensor, at: Operands) -> Tensor | None:
        dropped = at.training and at.config.hira_dropout
        return None if dropped else summed(x, at, lambda at: at.weight * _product(at))

    def merged(self, name: str, base: Tensor, at: Operands) -> Tensor:
        return base + base * at.like_weight(_product(at))

    @property
    def idles(self) -> bool:
        return True

    def sized(self, config: HiraConfig) -> tuple[str, ...]:
        return "r", "rank_pattern"

    def of_rank(self, config: HiraConfig, r: int) -> HiraConfig:
        return config.replace(r=r, rank_pattern={})

    def check(self, site: Site, config: HiraConfig) -> None:
        if site.reading == IN_PROJ or site.groups > 1:
            what = "packs three weights" if site.reading == IN_PROJ else f"is a convolution of {site.groups} groups"
            raise ConfigError(f"{site.name} {what}, for which there is no HiRA; exclude it")

    def tensors(self, site: Site, config: HiraConfig) -> dict[str, Spec]:
        rank = int(pattern_value(config.rank_pattern, site.named, config.r))
        a, b = site.reading.factors(site.weight_shape, site.groups, rank)
        of = "hira_embedding" if site.reading.lookup else "hira"
        return {"hira_A": Spec(f"{of}_A", a), "hira_B": Spec(f"{of}_B", b)}

    def init(
        self,
        site: Site,
        config: HiraConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        a, b = tensors["hira_A"], tensors["hira_B"]
        if not config.init_weights:
            nn.init.normal_(a, generator=rng)
            nn.init.normal_(b, generator=rng)
        elif site.reading.lookup:
            a.zero_()
            nn.init.normal_(b, generator=rng)
        else:
            b.zero_()
            if config.init_weights == "gaussian":
                nn.init.normal_(a, std=1 / len(a), generator=rng)
            else:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=rng)


def _product(at: Operands) -> Any:
    """B A (out, in · kernel)"""
    a, b = aten.flatten.using_ints(at.hira_A, 1), aten.flatten.using_ints(at.hira_B, 1)
    return aten.mm.default(b, a)
