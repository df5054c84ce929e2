"""What LoHa and LoKr have in common: an update that is a matrix made of small ones, in other ways than LoRA's.

    y = x Wᵀ + b + s · x ΔWᵀ          s = alpha / r

In training, `rank_dropout` drops that share of ΔW's rows, and `module_dropout` all of it in that share of calls, as in
LyCORIS (Yeh et al., 2023, arXiv 2309.14859, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..config import AdapterConfig, is_number, require, require_counts, require_dropouts, require_flags
from ..low_rank import LowRank
from ..site import Site
from .kind import Kind, Operands
from .lora import pattern_value, rank
from .lora_config import check_patterns

aten = torch.ops.aten


def _check(config: LycorisConfig) -> None:
    require_counts(config, "r")
    require(is_number(config.alpha), "alpha", config.alpha, "a number")
    require_dropouts(config, "rank_dropout", "module_dropout")
    require_flags(config, "use_effective_conv2d")


@dataclass(frozen=True, kw_only=True)
class LycorisConfig(AdapterConfig):
    """The fields that these configs share, with PEFT's names and defaults."""

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init_weights: bool | str = True

    checks: ClassVar[tuple[Callable[[Any], None], ...]] = (_check, check_patterns)
    null_is_default = "rank_pattern", "alpha_pattern"


class Lycoris(Kind):
    """An update that is made of small matrices. A subclass has its `update` and the rows that dropout leaves."""

    additive = True

    def update(self, x: Any, at: Operands) -> Any:
        """x ΔWᵀ: of the shape of the operator's result."""
        raise NotImplementedError

    def rescales(self, config: Any) -> bool:
        """Whether rows that are left by `rank_dropout` are divided by their share."""
        raise NotImplementedError

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        update = aten.mul.Tensor(self.update(x, at), at.scaling)
        config = at.config
        if at.training and config.rank_dropout:
            row = aten.flatten.using_ints(next(iter(at.tensors.values())))
            row = aten.new_empty.default(row, [at.site.out_features])
            kept = aten.type_as.default(aten.gt.Scalar(_random_like(row), config.rank_dropout), row)
            kept = aten.div.Tensor(kept, aten.mean.default(kept)) if self.rescales(config) else kept
            update = aten.mul.Tensor(update, at.outputs(kept))
        if at.training and config.module_dropout:
            one = aten.new_empty.default(next(iter(at.tensors.values())), [])
            kept = aten.type_as.default(aten.gt.Scalar(_random_like(one), config.module_dropout), one)
            update = aten.mul.Tensor(update, kept)
        return aten.add.Tensor(y, update)

    def numbers(self, site: Site, config: Any) -> dict[str, float]:
        return {"scaling": pattern_value(config.alpha_pattern, site.named, config.alpha) / rank(site, config)}

    def check(self, site: Site, config: Any) -> None:
        if site.reading.lookup:
            name = type(config).__name__.removesuffix("Config")
            raise ConfigError(f"{site.name} is an embedding, for which there is no {name}; exclude it")


def has_core(site: Site, config: Any) -> bool:
    """Whether a kernel has factors of its own, `use_effective_conv2d` (Hyeon-Woo et al., 2108.06098, proposition 3)."""
    return config.use_effective_conv2d and math.prod(site.weight_shape[2:]) > 1


def core_shape(site: Site, r: int) -> tuple[int, ...]:
    """The shape of those; as in PEFT, a kernel of one dimension is written as one of two."""
    kernel = site.weight_shape[2:]
    return r, r, *kernel, *[1] * (len(kernel) == 1)


def with_core(core: Any, a: Any, b: Any) -> Any:
    """Σ_ij core_ijk a_ip b_jq: (r, r, …), (r, rows), (r, columns) -> (rows, columns · kernel)"""
    made = aten.einsum.default("ijk,ip,jq->pqk", [aten.flatten.using_ints(core, 2), a, b])
    return aten.flatten.using_ints(made, 1)


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """A B, with the same bits whoever multiplies, in the dtype of A."""
    return LowRank(a, b, (a.shape[0], b.shape[1])).dense().to(a.dtype)


def kaiming(tensor: Tensor, rng: torch.Generator | None) -> None:
    """The start values that torch gives linear layers."""
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=rng)


def _random_like(tensor: Any) -> Any:
    """Numbers from 0 to 1 where the tensor is: those of float32, since few are different in half precision."""
    return aten.rand_like.default(tensor, dtype=torch.float32)
