"""VeRA (Kopiczko et al., 2023, arXiv 2310.11454, section 3).

    y = x Wᵀ + b + λ_b ∘ ((λ_d ∘ (dropout(x) Aᵀ)) Bᵀ)        so ΔW = diag(λ_b) B diag(λ_d) A

λ_b (out,) and λ_d (r,) train. A and B are random and stay so: one pair for all sites, A (r, largest in) and
B (largest out, r), of which a site has the first columns and rows. λ_b is put into B, which is smaller than y, and
there is no ΔW. At first λ_b is 0 and λ_d is `d_initial`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import AdapterConfig, require_bias, require_counts, require_dropouts
from ..default_targets import VERA_TARGETS
from ..low_rank import LowRank
from ..site import Selection, Site
from .kind import Kind, Operands, Spec, require_linear

aten = torch.ops.aten


def _check(config: VeraConfig) -> None:
    require_counts(config, "r")
    require_dropouts(config, "vera_dropout")
    require_bias(config, "vera_only")


@dataclass(frozen=True, kw_only=True)
class VeraConfig(AdapterConfig):
    """The fields of `peft.VeraConfig`, with its names and defaults.

    `projection_prng_key` is the seed of A and B; without `save_projection` files do not have them, and they are drawn
    again where an adapter is loaded. Raises `ConfigError` for a value of the wrong type or range, naming the field.
    """

    peft_type: str = "VERA"
    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    checks = (_check,)
    default_targets = VERA_TARGETS
    absent = ("exclude_modules",)


class Vera(Kind):
    """The VeRA kind; see the module's docstring for its equation."""

    config = VeraConfig
    additive = True

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        a, b = _projections(at)
        hidden = aten.mul.Tensor(at.narrow(at.dropout(x, at.config.vera_dropout), a), at.lambda_d)
        return aten.add.Tensor(y, at.wide(hidden, aten.mul.Tensor(b, aten.unsqueeze.default(at.lambda_b, 1))))

    def delta(self, name: str, at: Operands) -> LowRank | Tensor:
        a, b = _projections(at)
        return at.product(at.lambda_d[:, None] * a, at.lambda_b[:, None] * b)

    def check(self, site: Site, config: VeraConfig) -> None:
        require_linear(site, config)

    def tensors(self, site: Site, config: VeraConfig) -> dict[str, Spec]:
        return {
            "lambda_b": Spec("vera_lambda_b", (site.out_features,)),
            "lambda_d": Spec("vera_lambda_d", (config.r,)),
        }

    def shared(self, selection: Selection, config: VeraConfig) -> dict[str, Spec]:
        inputs, outputs = (max(getattr(s, which) for s in selection) for which in ("in_features", "out_features"))
        return {
            "vera_A": Spec("vera_A", (config.r, inputs), fixed=True, saved=config.save_projection),
            "vera_B": Spec("vera_B", (outputs, config.r), fixed=True, saved=config.save_projection),
        }

    def draw(self, config: VeraConfig, tensors: Mapping[str, Tensor]) -> None:
        rng = torch.Generator().manual_seed(config.projection_prng_key)
        nn.init.kaiming_uniform_(tensors["vera_A"], generator=rng)
        nn.init.kaiming_uniform_(tensors["vera_B"], generator=rng)

    def init(
        self,
        site: Site,
        config: VeraConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        if config.init_weights:
            tensors["lambda_b"].zero_()
            tensors["lambda_d"].fill_(config.d_initial)
        else:
            tensors["lambda_b"].fill_(1)
            nn.init.normal_(tensors["lambda_d"], generator=rng)


def _projections(at: Operands) -> tuple[Any, Any]:
    """The site's parts of A and B: (r, in) and (out, r)."""
    inputs, outputs = at.site.in_features, at.site.out_features
    return aten.slice.Tensor(at.vera_A, 1, 0, inputs), aten.slice.Tensor(at.vera_B, 0, 0, outputs)
