"""SHiRA (Bhardwaj et al., 2024, arXiv 2406.13175, section 3): a few numbers of the weight train, and no others.

    y = x (W + s · S)ᵀ + b        S is 0 but at r · (in + out) places: as many numbers as LoRA of rank r has

The places are drawn once, at random (section 3.1, SHiRA-Rand), and are part of the file. S is made at each call, by
writing its numbers into zeros: a gather of x for each number would need more memory than S does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..config import AdapterConfig, require, require_counts
from ..default_targets import SHIRA_TARGETS
from ..site import Site
from .kind import Kind, Operands, Spec, require_linear, summed

aten = torch.ops.aten


def _check(config: ShiraConfig) -> None:
    require_counts(config, "r")
    seed = config.random_seed
    require(seed is None or (isinstance(seed, int) and not isinstance(seed, bool)), "random_seed", seed, "an int")
    require(isinstance(config.mask_type, str), "mask_type", config.mask_type, "a string")


@dataclass(frozen=True, kw_only=True)
class ShiraConfig(AdapterConfig):
    """The fields of `peft.ShiraConfig`, with its names and defaults.

    `mask_type` other than "random" stands for a function of somebody's own: such adapters can be loaded, since files
    have the places, and not made. Raises `ConfigError` for a value of the wrong type or range, naming the field.
    """

    peft_type: str = "SHIRA"
    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    checks = (_check,)
    default_targets = SHIRA_TARGETS
    absent = ("exclude_modules", "layers_to_transform", "layers_pattern")


class Shira(Kind):
    """The SHiRA kind; see the module's docstring for its equation."""

    config = ShiraConfig
    additive = True

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        return aten.add.Tensor(y, at.full(x, _sparse(at)))

    def fused(self, x: Tensor, at: Operands) -> Tensor | None:
        return summed(x, at, _sparse)

    def delta(self, name: str, at: Operands) -> Tensor:
        return at.like_weight(_sparse(at))

    def numbers(self, site: Site, config: ShiraConfig) -> dict[str, float]:
        return {"scaling": 1.0}

    def check(self, site: Site, config: ShiraConfig) -> None:
        require_linear(site, config)
        if _count(site, config) > site.in_features * site.out_features:
            raise ConfigError(
                f"`r`={config.r} asks for {_count(site, config)} numbers of {site.name}, which has "
                f"{site.in_features * site.out_features}; choose a smaller one"
            )

    def tensors(self, site: Site, config: ShiraConfig) -> dict[str, Spec]:
        count = _count(site, config)
        return {
            "values": Spec("shira_weight", (count,)),
            "places": Spec("shira_indices", (2, count), fixed=True, dtype=torch.int32),  # rows, and columns
        }

    def init(
        self,
        site: Site,
        config: ShiraConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        if config.mask_type != "random":
            raise ConfigError(f'`mask_type` must be "random" to make an adapter, not {config.mask_type!r}')
        if config.init_weights:
            tensors["values"].zero_()
        else:
            nn.init.normal_(tensors["values"], generator=rng)
        drawn = torch.Generator() if config.random_seed is None else torch.Generator().manual_seed(config.random_seed)
        chosen = torch.randperm(site.in_features * site.out_features, generator=drawn)[: _count(site, config)]
        chosen = chosen.sort().values
        tensors["places"].copy_(torch.stack([chosen // site.in_features, chosen % site.in_features]))


def _count(site: Site, config: ShiraConfig) -> int:
    return config.r * (site.in_features + site.out_features)


def _sparse(at: Operands) -> Any:
    """s · S, (out, in)."""
    values = aten.mul.Tensor(at.values, at.scaling)
    zeros = aten.new_zeros.default(values, [at.site.out_features, at.site.in_features])
    return aten.index_put.default(zeros, [aten.select.int(at.places, 0, row) for row in (0, 1)], values)
