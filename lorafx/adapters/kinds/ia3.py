"""(IA)³ (Liu et al., 2022, arXiv 2205.05638, section 3.3), which multiplies activations instead of adding to them.

    y = l ∘ (x Wᵀ + b)         W' = diag(l) W,  b' = l ∘ b         l (out,): for most layers
    y = (l ∘ x) Wᵀ + b         W' = W diag(l)                      l (in,): for those that `feedforward_modules` names

l starts as ones. Files have it as (out, 1) or (1, in), and for a convolution as (1, channels, 1, …).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ..combining import Combination
from ..config import AdapterConfig, Names, is_strings, require, require_flags, require_regexes
from ..default_targets import IA3_FEEDFORWARD, IA3_TARGETS
from ..site import Selection, Site
from .kind import Kind, Operands, Spec

aten = torch.ops.aten


def _check(config: IA3Config) -> None:
    feedforward, targets = config.feedforward_modules, config.target_modules
    fits = feedforward is None or isinstance(feedforward, str) or is_strings(feedforward)
    require(fits, "feedforward_modules", feedforward, "a string, a list of strings or None")
    if isinstance(feedforward, str):
        require_regexes(config, "feedforward_modules")
    elif isinstance(targets, tuple) and (others := sorted({*(feedforward or ())}.difference(targets))):
        raise ConfigError(f"`feedforward_modules` has {', '.join(others)}, which `target_modules` has not")
    require_flags(config, "fan_in_fan_out", "init_ia3_weights")


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """What to adapt and how: the fields of `peft.IA3Config`, with its names and defaults.

    `feedforward_modules` are those whose inputs are multiplied: endings of names, or a regex for the whole name.
    """

    peft_type: str = "IA3"
    feedforward_modules: Names = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    checks = (_check,)
    tuples = (*AdapterConfig.tuples, "feedforward_modules")
    absent = ("layers_to_transform", "layers_pattern")
    default_targets = IA3_TARGETS


class Ia3(Kind):
    """The (IA)³ kind; see the module's docstring for its equations."""

    config = IA3Config

    def before(self, x: Any, at: Operands) -> Any:
        return aten.mul.Tensor(x, at.inputs(_flat(at))) if at.of_inputs else x

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        return y if at.of_inputs else aten.mul.Tensor(y, at.outputs(_flat(at)))

    def changes(self, site: Site, config: IA3Config) -> tuple[str, ...]:
        return ("weight", "bias") if site.has_bias and not _of_inputs(site, config) else ("weight",)

    def merged(self, name: str, base: Tensor, at: Operands) -> Tensor:
        return base * (at.l.flatten() if name == "bias" else _like(base, at))

    def unmerged(self, name: str, merged: Tensor, at: Operands) -> Tensor:
        return merged / (at.l.flatten() if name == "bias" else _like(merged, at))

    def tensors(self, site: Site, config: IA3Config) -> dict[str, Spec]:
        of_inputs, spatial = _of_inputs(site, config), len(site.weight_shape) - 2
        count = site.in_features if of_inputs else site.out_features
        shape = (1, count) if of_inputs else (count, 1)
        return {"l": Spec("ia3_l", (1, count, *[1] * spatial) if spatial else shape, as_kept=True)}

    def numbers(self, site: Site, config: IA3Config) -> dict[str, float]:
        return {"of_inputs": float(_of_inputs(site, config))}  # which layers that are run by one block have in common

    def init(
        self,
        site: Site,
        config: IA3Config,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        if config.init_ia3_weights:
            tensors["l"].fill_(1)
        else:
            tensors["l"].normal_(generator=rng)

    def settled(self, config: IA3Config, model_type: str | None) -> IA3Config:
        if config.feedforward_modules is not None:
            return config
        if model_type not in IA3_FEEDFORWARD:
            raise ConfigError(
                f"`feedforward_modules` is None and no default is known for {model_type or 'this model'!r}; name the "
                "modules whose inputs are to be multiplied, or give an empty list"
            )
        named, targets = IA3_FEEDFORWARD[model_type], config.target_modules
        return config.replace(feedforward_modules=tuple(n for n in named if targets is None or n in targets))

    def check(self, site: Site, config: IA3Config) -> None:
        if site.reading.lookup:
            raise ConfigError(f"{site.name} is an embedding, for which there is no (IA)³; exclude it")

    def combined_config(
        self, configs: Sequence[IA3Config], selections: Sequence[Selection], how: Combination
    ) -> IA3Config:
        if how.prunes or how.combination_type == "cat":
            raise ConfigError(f'(IA)³ adapters are combined by "linear", not {how.combination_type!r}, as in PEFT')
        acts = [{site.name: _of_inputs(site, config) for site in sites} for config, sites in zip(configs, selections)]
        if any(each != acts[0] for each in acts):
            raise ConfigError(
                "(IA)³ adapters can be combined that adapt the same modules, and multiply the inputs of the same ones: "
                "what one leaves as it is has no l to be added to the other's"
            )
        return configs[0].replace(init_ia3_weights=True)

    def combined(
        self,
        site: Site,
        config: IA3Config,
        parts: Sequence[tuple[float, Operands]],
        how: Combination,
        rng: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """Σ wᵢ lᵢ"""
        return {"l": how.combined([at.l for _, at in parts], [weight for weight, _ in parts], rng)}


def _of_inputs(site: Site, config: IA3Config) -> bool:
    """Whether a site's inputs are multiplied. As in PEFT a name is a plain ending: "wo" also means "two"."""
    named = config.feedforward_modules or ()
    return re.fullmatch(named, site.named) is not None if isinstance(named, str) else site.named.endswith(tuple(named))


def _flat(at: Operands) -> Any:
    return aten.view.default(at.l, [-1])


def _like(weight: Tensor, at: Operands) -> Tensor:
    """l in a shape that the dense weight can be multiplied by."""
    l, kernel = at.l.flatten(), at.site.weight_shape[2:]
    if not at.of_inputs:
        return at.like_weight(l[:, None].expand(-1, math.prod(at.site.weight_shape) // len(l)))
    rows = l.view(at.site.groups, 1, -1, 1).expand(-1, at.site.out_features // at.site.groups, -1, math.prod(kernel))
    return at.like_weight(rows.reshape(at.site.out_features, -1))
