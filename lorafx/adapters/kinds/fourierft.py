"""FourierFT (Gao et al., 2024, arXiv 2405.03003, section 3): the update is the transform of a few frequencies.

    y = x (W + s · Re(ifft2(C)))ᵀ + b        C (out, in) is 0 but at n places, whose numbers c (n,) train

The places are drawn from a seed and the same at sites of one shape. The update is not made: x is transformed instead
(`ops/fourier_linear.py`). c is random at first, as in the paper, or 0 with `init_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...ops.fourier_linear import fourier_weight
from ..config import AdapterConfig, is_count, is_number, require, require_bias, require_counts, require_patterns
from ..default_targets import FOURIERFT_TARGETS
from ..site import Site
from .kind import Kind, Operands, Spec, require_linear
from .lora import pattern_value

aten = torch.ops.aten


def _check(config: FourierFTConfig) -> None:
    seed = config.random_loc_seed
    require_counts(config, "n_frequency")
    require(is_number(config.scaling), "scaling", config.scaling, "a number")
    require(isinstance(seed, int) and not isinstance(seed, bool), "random_loc_seed", seed, "an int")
    require_bias(config, "fourier_only")
    require_patterns(config, "n_frequency_pattern", is_count, "positive ints")


@dataclass(frozen=True, kw_only=True)
class FourierFTConfig(AdapterConfig):
    """The fields of `peft.FourierFTConfig`, with its names and defaults.

    Raises `ConfigError` for a value of the wrong type or range, naming the field.
    """

    peft_type: str = "FOURIERFT"
    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: str = "none"
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict)
    init_weights: bool = False

    checks = (_check,)
    null_is_default = ("n_frequency_pattern",)
    default_targets = FOURIERFT_TARGETS


class FourierFT(Kind):
    """The FourierFT kind; see the module's docstring for its equation."""

    config = FourierFTConfig
    additive = True

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        spectrum = aten.mul.Tensor(at.spectrum, at.scaling)
        update = torch.ops.lorafx.fourier_linear.default(x, spectrum, at.places, at.site.out_features)
        return aten.add.Tensor(y, update)

    def delta(self, name: str, at: Operands) -> Tensor:
        shape = at.site.out_features, at.site.in_features
        return at.like_weight(fourier_weight(at.spectrum * at.scaling, at.places, shape))

    def numbers(self, site: Site, config: FourierFTConfig) -> dict[str, float]:
        return {"scaling": config.scaling}

    def check(self, site: Site, config: FourierFTConfig) -> None:
        require_linear(site, config)
        if _count(site, config) > site.in_features * site.out_features:
            raise ConfigError(
                f"`n_frequency`={_count(site, config)} is more than the {site.in_features * site.out_features} that "
                f"{site.name} has; choose less, or an `n_frequency_pattern` for it"
            )

    def tensors(self, site: Site, config: FourierFTConfig) -> dict[str, Spec]:
        count = _count(site, config)
        return {
            "spectrum": Spec("fourierft_spectrum", (count,), as_kept=True),
            "places": Spec("fourierft_places", (2, count), fixed=True, saved=False, dtype=torch.int64),
        }

    def init(
        self,
        site: Site,
        config: FourierFTConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        drawn = torch.Generator().manual_seed(config.random_loc_seed)
        chosen = torch.randperm(site.out_features * site.in_features, generator=drawn)[: _count(site, config)]
        tensors["places"].copy_(torch.stack([chosen // site.in_features, chosen % site.in_features]))
        if config.init_weights:
            tensors["spectrum"].zero_()
        else:
            nn.init.normal_(tensors["spectrum"], generator=rng)


def _count(site: Site, config: FourierFTConfig) -> int:
    return int(pattern_value(config.n_frequency_pattern, site.named, config.n_frequency))
