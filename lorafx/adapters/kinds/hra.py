"""HRA: reflections of the features (Yuan et al., 2024, arXiv 2405.17484, section 3).

    y = x (H₁ … H_r)ᵀ Wᵀ + b         W' = W H₁ … H_r,   Hᵢ = I - 2 uᵢ uᵢᵀ, with uᵢ of norm 1
      = (x - (x U) (U T)ᵀ) Wᵀ + b    H₁ … H_r = I - U T Uᵀ: two products with r features (`ops/orthogonal.py`)

With `apply_GS` the uᵢ are made orthogonal first. They start in equal pairs, which cancel; orthogonal ones cannot, so
these start at random, where PEFT 0.21 divides by zero. Files have U, (in, r).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...ops import orthogonal as _operators  # noqa: F401, defines them
from ..config import AdapterConfig, require_bias, require_counts, require_flags
from ..site import Selection, Site
from .kind import Operands, Spec
from .lycoris import kaiming
from .turning import Turning, columns, require_turnable

aten = torch.ops.aten


def _check(config: HRAConfig) -> None:
    require_counts(config, "r")
    require_flags(config, "apply_GS", "init_weights")
    require_bias(config, "hra_only")


@dataclass(frozen=True, kw_only=True)
class HRAConfig(AdapterConfig):
    """What to adapt and how: the fields of `peft.HRAConfig`, with its names and defaults."""

    peft_type: str = "HRA"
    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True
    bias: str = "none"

    checks = (_check,)


class Hra(Turning):
    """The HRA kind; see the module's docstring for its equation."""

    config = HRAConfig

    def turned(self, x: Any, at: Operands, transposed: bool = False) -> Any:
        u, ut = reversed(_factors(at)) if transposed else _factors(at)
        hidden = aten.matmul.default(x, aten.type_as.default(u, x))
        return aten.sub.Tensor(x, aten.linear.default(hidden, aten.type_as.default(ut, x)))

    def merged(self, name: str, base: Tensor, at: Operands) -> Tensor:
        return at.like_weight(self.turned(at.matrix(base), at, transposed=True))

    def unmerged(self, name: str, merged: Tensor, at: Operands) -> Tensor:
        return at.like_weight(self.turned(at.matrix(merged), at))  # an orthogonal matrix's inverse is its transpose

    @property
    def idles(self) -> bool:
        return True

    def sized(self, config: HRAConfig) -> tuple[str, ...]:
        return ("r",)

    def of_rank(self, config: HRAConfig, r: int) -> HRAConfig:
        return config.replace(r=r)

    def tensors(self, site: Site, config: HRAConfig) -> dict[str, Spec]:
        return {"u": Spec("hra_u", (columns(site), config.r), as_kept=True)}

    def init(
        self,
        site: Site,
        config: HRAConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        u = tensors["u"]
        kaiming(u, rng)
        if _starts_in_pairs(config):
            half = u.new_empty(u.shape[0], u.shape[1] // 2)
            kaiming(half, rng)
            u.copy_(half.repeat_interleave(2, dim=1))

    def check(self, site: Site, config: HRAConfig) -> None:
        require_turnable(site, "HRA")
        if config.apply_GS and config.r > columns(site):
            raise ConfigError(f"{site.name} has {columns(site)} inputs, and so many orthogonal vectors at most")

    def remarks(self, selection: Selection, config: HRAConfig) -> Iterator[str]:
        if config.init_weights and not _starts_in_pairs(config):
            why = "orthogonal reflections" if config.apply_GS else f"{config.r} reflections, which are no pairs,"
            yield f"{why} change the model from the start"


def _starts_in_pairs(config: HRAConfig) -> bool:
    return config.init_weights and config.r % 2 == 0 and not config.apply_GS


def _factors(at: Operands) -> tuple[Any, Any]:
    """U and U T, (in, r)."""
    found = torch.ops.lorafx.reflections.default(at.u, at.config.apply_GS)
    return found[0], found[1]
