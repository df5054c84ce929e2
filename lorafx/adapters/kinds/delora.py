"""DeLoRA (Bini et al., 2025, arXiv 2503.18225, section 3): LoRA whose directions have a fixed length.

    y = x Wᵀ + b + (((x ∘ n) Aᵀ) ∘ d) Bᵀ        d = λ / (r · ‖A‖ · ‖B‖), of each row of A and column of B

λ (1,) bounds how far ΔW = B diag(d) A diag(n) may go from 0 and trains, as A (r, in) and B (out, r) do. n (in,) are the
norms of the base weight's columns as it was when the adapter was made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import (
    AdapterConfig,
    is_count,
    is_number,
    require,
    require_bias,
    require_counts,
    require_dropouts,
    require_patterns,
)
from ..low_rank import LowRank
from ..site import Site
from .kind import Kind, Operands, Spec, require_linear
from .lora import pattern_value

aten = torch.ops.aten
_SMALLEST = 1e-4  # a norm below it counts as it: B is 0 at first


def _check(config: DeloraConfig) -> None:
    require_counts(config, "r")
    require(is_number(config.delora_lambda), "delora_lambda", config.delora_lambda, "a number")
    require_dropouts(config, "module_dropout")
    require_bias(config, "delora_only")
    require_patterns(config, "rank_pattern", is_count, "positive ints")
    require_patterns(config, "lambda_pattern", is_number, "numbers")


@dataclass(frozen=True, kw_only=True)
class DeloraConfig(AdapterConfig):
    """The fields of `peft.DeloraConfig`, with its names and defaults; `module_dropout` is that of x.

    Raises `ConfigError` for a value of the wrong type or range, naming the field.
    """

    peft_type: str = "DELORA"
    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    lambda_pattern: Mapping[str, float] = field(default_factory=dict)

    checks = (_check,)
    null_is_default = "rank_pattern", "lambda_pattern"


class Delora(Kind):
    """The DeLoRA kind; see the module's docstring for its equation."""

    config = DeloraConfig
    additive = True
    starts_from_weight = True

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        x = aten.mul.Tensor(at.dropout(x, at.config.module_dropout), at.column_norms)
        hidden = aten.mul.Tensor(at.narrow(x, at.delora_A), _lengths(at))
        return aten.add.Tensor(y, at.wide(hidden, at.delora_B))

    def delta(self, name: str, at: Operands) -> LowRank | Tensor:
        return at.product(_lengths(at)[:, None] * at.delora_A * at.column_norms, at.delora_B)

    def check(self, site: Site, config: DeloraConfig) -> None:
        require_linear(site, config)

    def tensors(self, site: Site, config: DeloraConfig) -> dict[str, Spec]:
        rank = int(self.numbers(site, config)["rank"])
        return {
            "delora_A": Spec("delora_A", (rank, site.in_features)),
            "delora_B": Spec("delora_B", (site.out_features, rank)),
            "delora_lambda": Spec("delora_lambda", (1,)),
            "column_norms": Spec("delora_w_norm", (site.in_features,), fixed=True),
        }

    def numbers(self, site: Site, config: DeloraConfig) -> dict[str, float]:
        return {"rank": pattern_value(config.rank_pattern, site.named, config.r)}

    def init(
        self,
        site: Site,
        config: DeloraConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        nn.init.kaiming_uniform_(tensors["delora_A"], a=math.sqrt(5), generator=rng)
        if config.init_weights:
            tensors["delora_B"].zero_()
        else:
            nn.init.kaiming_uniform_(tensors["delora_B"], a=math.sqrt(5), generator=rng)
        tensors["delora_lambda"].fill_(pattern_value(config.lambda_pattern, site.named, config.delora_lambda))
        assert weight is not None, "what starts from the weight is given it"
        tensors["column_norms"].copy_(weight.norm(dim=1 if site.reading.transposed else 0))


def _lengths(at: Operands) -> Any:
    """d (r,)"""
    a = aten.clamp_min.default(aten.linalg_vector_norm.default(at.delora_A, 2, [1]), _SMALLEST)
    b = aten.clamp_min.default(aten.linalg_vector_norm.default(at.delora_B, 2, [0]), _SMALLEST)
    return aten.div.Tensor(aten.div.Tensor(at.delora_lambda, at.rank), aten.mul.Tensor(a, b))
