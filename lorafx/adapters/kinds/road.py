"""RoAd (Liao and Monz, 2024, arXiv 2409.00119, section 3): the layer's result is turned, two features at a time.

    [y_p', y_q'] = [[f_p, -s_p], [s_q, f_q]] [y_p, y_q]        f = α cos θ, s = α sin θ

of y with its bias. In each group of `group_size` features the first half is paired with the second. α and θ are one
number a pair ("road_1"), one a feature ("road_2"), or one for f and another for s of each feature ("road_4"). At first
α is 1 and θ 0. Merging turns the rows of W, and b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..config import AdapterConfig, is_count, require
from ..site import Site
from .kind import Kind, Operands, Spec, require_linear

aten = torch.ops.aten
_NUMBERS = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # of α, and of θ, a feature


def _check(config: RoadConfig) -> None:
    require(config.variant in _NUMBERS, "variant", config.variant, f"one of {', '.join(_NUMBERS)}")
    fits = is_count(config.group_size) and config.group_size % 2 == 0
    require(fits, "group_size", config.group_size, "an even positive int")


@dataclass(frozen=True, kw_only=True)
class RoadConfig(AdapterConfig):
    """The fields of `peft.RoadConfig`, with its names and defaults.

    Raises `ConfigError` for a value of the wrong type or range, naming the field.
    """

    peft_type: str = "ROAD"
    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True

    checks = (_check,)
    absent = "exclude_modules", "layers_to_transform", "layers_pattern"


class Road(Kind):
    """The RoAd kind; see the module's docstring for its equation."""

    config = RoadConfig

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        return _turned(y, at)

    def changes(self, site: Site, config: RoadConfig) -> tuple[str, ...]:
        return ("weight", "bias") if site.has_bias else ("weight",)

    def merged(self, name: str, base: Tensor, at: Operands) -> Tensor:
        return _turned(base, at) if name == "bias" else at.like_weight(_turned(at.matrix(base).t(), at).t())

    def check(self, site: Site, config: RoadConfig) -> None:
        require_linear(site, config)
        if site.out_features % config.group_size:
            raise ConfigError(
                f"{site.name} gives {site.out_features} features, which are no groups of `group_size`="
                f"{config.group_size}; choose another"
            )

    def tensors(self, site: Site, config: RoadConfig) -> dict[str, Spec]:
        count = int(site.out_features * _NUMBERS[config.variant])
        return {
            "theta": Spec("road_theta", (count,), as_kept=True),
            "alpha": Spec("road_alpha", (count,), as_kept=True),
        }

    def init(
        self,
        site: Site,
        config: RoadConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        if config.init_weights:
            tensors["theta"].zero_()
            tensors["alpha"].fill_(1)
        else:
            nn.init.normal_(tensors["theta"], std=0.5, generator=rng)
            nn.init.normal_(tensors["alpha"], mean=1.0, std=0.5, generator=rng)


def _turned(y: Any, at: Operands) -> Any:
    """y (…, out) with each pair of features turned."""
    first, second = _halves(aten.unflatten.int(y, -1, [-1, 2, at.config.group_size // 2]))
    f, s = _factors(at)
    (f_p, f_q), (s_p, s_q) = _halves(f), _halves(s)
    one = aten.sub.Tensor(aten.mul.Tensor(first, f_p), aten.mul.Tensor(second, s_p))
    other = aten.add.Tensor(aten.mul.Tensor(second, f_q), aten.mul.Tensor(first, s_q))
    return aten.flatten.using_ints(aten.stack.default([one, other], -2), -3)


def _factors(at: Operands) -> tuple[Any, Any]:
    """f and s, (groups, 2, group_size / 2); of "road_1" the two halves share their numbers, (groups, 1, …)."""
    half = at.config.group_size // 2
    if at.config.variant == "road_4":
        shape = [-1, 2, 2, half]
        (alpha_f, alpha_s), (theta_f, theta_s) = (
            [aten.select.int(aten.view.default(each, shape), 1, number) for number in (0, 1)]
            for each in (at.alpha, at.theta)
        )
    else:
        shape = [-1, 1 if at.config.variant == "road_1" else 2, half]
        alpha_f = alpha_s = aten.view.default(at.alpha, shape)
        theta_f = theta_s = aten.view.default(at.theta, shape)
    return (
        aten.mul.Tensor(alpha_f, aten.cos.default(theta_f)),
        aten.mul.Tensor(alpha_s, aten.sin.default(theta_s)),
    )


def _halves(grouped: Any) -> tuple[Any, Any]:
    """The two halves of the groups, (…, groups, group_size / 2); where they share numbers, these twice."""
    return aten.select.int(grouped, -2, 0), aten.select.int(grouped, -2, -1)
