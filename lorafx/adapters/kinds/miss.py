"""MiSS (Kang and Yin, 2024, arXiv 2409.15371): one block of numbers, added to each block of the weight's columns.

    y = x Wᵀ + b + (Σ_i x_i) D        x_i the blocks of r features of dropout(x), zeros after the last; D (r, out)

So ΔW = [Dᵀ Dᵀ …], and x is folded to r features first. With `init_weights="mini"` D repeats numbers too: it is
[M M …] of M (r, mini_r). With "bat" the update goes through W, of blocks r by r, and is made:

    ΔW_ji = W_ji B_j + B_j        of block row j and block column i; B (out / r, r, r)

All start at 0, but for `init_weights=False`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..config import AdapterConfig, require, require_bias, require_counts, require_dropouts
from ..site import Selection, Site
from .kind import Kind, Operands, Spec, require_linear, summed

aten = torch.ops.aten


def _check(config: MissConfig) -> None:
    require_counts(config, "r", "mini_r")
    require_dropouts(config, "miss_dropout")
    fits = isinstance(config.init_weights, bool) or config.init_weights in ("bat", "mini")
    require(fits, "init_weights", config.init_weights, 'True, False, "bat" or "mini"')
    require_bias(config, "MiSS_only")


@dataclass(frozen=True, kw_only=True)
class MissConfig(AdapterConfig):
    """The fields of `peft.MissConfig`, with its names and defaults: `init_weights` says which form of MiSS it is.

    Raises `ConfigError` for a value of the wrong type or range, naming the field.
    """

    peft_type: str = "MISS"
    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | str = True
    bias: str = "none"

    checks = (_check,)


class Miss(Kind):
    """The MiSS kind, and its form "mini"; see the module's docstring for its equation."""

    config = MissConfig
    additive = True

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        return aten.add.Tensor(y, at.wide(_folded(at.dropout(x, at.config.miss_dropout), at), _block(at)))

    def delta(self, name: str, at: Operands) -> Tensor:
        times = math.ceil(at.site.in_features / at.config.r)
        return at.like_weight(_block(at).repeat(1, times)[:, : at.site.in_features])

    def check(self, site: Site, config: MissConfig) -> None:
        require_linear(site, config)
        if config.r > site.in_features:
            raise ConfigError(f"`r`={config.r} is more than the {site.in_features} features that {site.name} is given")
        if config.init_weights == "mini" and site.out_features % config.mini_r:
            raise ConfigError(f"`mini_r`={config.mini_r} does not divide the {site.out_features} rows of {site.name}")

    def tensors(self, site: Site, config: MissConfig) -> dict[str, Spec]:
        columns = config.mini_r if config.init_weights == "mini" else site.out_features
        return {"block": Spec("miss_block", (config.r, columns))}

    def init(
        self,
        site: Site,
        config: MissConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        if config.init_weights:
            tensors["block"].zero_()
        else:
            nn.init.kaiming_uniform_(tensors["block"], a=math.sqrt(5), generator=rng)


class Bat(Miss):
    """MiSS in its form "bat"; see the module's docstring for its equation."""

    additive = False
    reads_weight = True

    def serves(self, config: MissConfig) -> bool:
        return config.init_weights == "bat"

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        weight = aten.type_as.default(at.matrix(at.weight), at.block)
        return aten.add.Tensor(y, at.full(x, _through(weight, at)))

    def fused(self, x: Tensor, at: Operands) -> Tensor | None:
        return summed(x, at, lambda at: _through(at.weight, at))

    def merged(self, name: str, base: Tensor, at: Operands) -> Tensor:
        return base + at.like_weight(_through(at.matrix(base), at))

    unmerged = Kind.unmerged

    def check(self, site: Site, config: MissConfig) -> None:
        super().check(site, config)
        if site.in_features % config.r or site.out_features % config.r:
            raise ConfigError(
                f"{site.name} is ({site.out_features}, {site.in_features}), and blocks of `r`={config.r} rows and "
                'columns do not fill that, as `init_weights="bat"` needs'
            )

    def remarks(self, selection: Selection, config: MissConfig) -> Iterator[str]:
        if config.miss_dropout:
            yield '`miss_dropout` has no effect with `init_weights="bat"`, as in PEFT'

    def tensors(self, site: Site, config: MissConfig) -> dict[str, Spec]:
        return {"block": Spec("miss_block", (site.out_features // config.r, config.r, config.r))}


def _folded(x: Any, at: Operands) -> Any:
    """The sum of the blocks of r features: (…, in) -> (…, r)."""
    r = at.config.r
    padded = aten.constant_pad_nd.default(x, [0, r - at.site.in_features % r]) if at.site.in_features % r else x
    return aten.sum.dim_IntList(aten.unflatten.int(padded, -1, [-1, r]), [-2])


def _block(at: Operands) -> Any:
    """Dᵀ (out, r)"""
    times = at.site.out_features // at.config.mini_r
    return aten.t.default(aten.repeat.default(at.block, [1, times]) if at.config.init_weights == "mini" else at.block)


def _through(weight: Any, at: Operands) -> Any:
    """ΔW (out, in) of W (out, in)."""
    r, (rows, columns) = at.config.r, (at.site.out_features, at.site.in_features)
    products = aten.bmm.default(aten.reshape.default(weight, [rows // r, columns, r]), at.block)
    blocks = aten.reshape.default(products, [rows // r, r, columns // r, r])
    return aten.reshape.default(aten.add.Tensor(blocks, aten.unsqueeze.default(at.block, 2)), [rows, columns])
