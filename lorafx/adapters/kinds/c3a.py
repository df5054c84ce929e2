"""C3A (Chen et al., 2024, arXiv 2407.19342, section 3): the update is made of circulant blocks.

    y = x (W + [circ(w_mn)] / in)ᵀ + b        w (out / b, in / b, b): blocks of b rows and columns, of b numbers each

The update is not made: Fourier transforms make a circulant block diagonal (`ops/circulant_linear.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...ops.circulant_linear import circulant_weight
from ..config import AdapterConfig, is_count, require, require_bias, require_counts, require_patterns
from ..default_targets import C3A_TARGETS
from ..site import Site
from .kind import Kind, Operands, Spec, require_linear
from .lora import pattern_value

aten = torch.ops.aten
_STARTS = (True, False, "gaussian", "kaiming_uniform", "xavier_uniform")


def _check(config: C3AConfig) -> None:
    require_counts(config, "block_size")
    require_bias(config, "c3a_only")
    require(config.init_weights in _STARTS, "init_weights", config.init_weights, f"one of {_STARTS}")
    require_patterns(config, "block_size_pattern", is_count, "positive ints")


@dataclass(frozen=True, kw_only=True)
class C3AConfig(AdapterConfig):
    """The fields of `peft.C3AConfig`, with its names and defaults.

    `init_weights=True` starts at 0; False is "xavier_uniform", as in PEFT. Raises `ConfigError` for a value of the
    wrong type or range, naming the field.
    """

    peft_type: str = "C3A"
    block_size: int = 256
    bias: str = "none"
    block_size_pattern: Mapping[str, int] = field(default_factory=dict)
    init_weights: bool | str = "xavier_uniform"

    checks = (_check,)
    absent = ("exclude_modules",)
    null_is_default = ("block_size_pattern",)
    default_targets = C3A_TARGETS


class C3A(Kind):
    """The C3A kind; see the module's docstring for its equation."""

    config = C3AConfig
    additive = True

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        return aten.add.Tensor(y, torch.ops.lorafx.circulant_linear.default(x, at.kernel))

    def delta(self, name: str, at: Operands) -> Tensor:
        return at.like_weight(circulant_weight(at.kernel))

    def check(self, site: Site, config: C3AConfig) -> None:
        require_linear(site, config)
        size = _size(site, config)
        if site.in_features % size or site.out_features % size:
            raise ConfigError(
                f"{site.name} is ({site.out_features}, {site.in_features}), and `block_size`={size} does not divide "
                "both; choose another, or a `block_size_pattern` for it"
            )

    def tensors(self, site: Site, config: C3AConfig) -> dict[str, Spec]:
        size = _size(site, config)
        return {"kernel": Spec("c3a_kernel", (site.out_features // size, site.in_features // size, size), as_kept=True)}

    def init(
        self,
        site: Site,
        config: C3AConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        kernel, start = tensors["kernel"], config.init_weights
        if start is True:
            kernel.zero_()
        elif start == "gaussian":
            nn.init.normal_(kernel, generator=rng)
        else:
            kaiming = start == "kaiming_uniform"
            bound = math.sqrt(1 / site.in_features if kaiming else 6 / (site.in_features + site.out_features))
            nn.init.uniform_(kernel, -bound, bound, generator=rng)


def _size(site: Site, config: C3AConfig) -> int:
    return int(pattern_value(config.block_size_pattern, site.named, config.block_size))
