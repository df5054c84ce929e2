"""AdaLoRA (Zhang et al., 2023, arXiv 2303.10512, section 3): LoRA as P Λ Q, whose rank training shares out among sites.

    y = x Wᵀ + b + s · ((dropout(x) Aᵀ) ∘ eᵀ) Bᵀ        A (r, in), e (r, 1), B (out, r); s = α / (r + 10⁻⁵), as in PEFT
    loss + w · mean(‖A Aᵀ - I‖, ‖Bᵀ B - I‖)              of all sites, w = `orth_reg_weight` (equation 4)

So it is LoRA with A ∘ e for its A; a convolution's A is (r, in · kernel). e starts as zeros. Which of its numbers are
set to zero again, `update_and_allocate` says (`adalora_allocator.py`): these are values, and graphs stay as they are.
Files leave out the directions that are zero; the config's `rank_pattern` says which these are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..low_rank import LowRank
from ..site import Selection, Site
from .adalora_allocator import SINGULAR, Allocator
from .adalora_config import AdaLoraConfig
from .kind import Kind, Operands, Spec
from .lora import Lora

aten = torch.ops.aten
LORA = Lora()
_ALONG = {"lora_A": 0, SINGULAR: 0, "lora_B": 1}  # the dimension in which a tensor has its directions


class AdaLora(Kind):
    """The AdaLoRA kind; see the module's docstring for its equation."""

    config = AdaLoraConfig
    additive = True
    about_values = ("rank_pattern",)

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        return LORA.after(y, x, _as_lora(at))

    def fused(self, x: Any, at: Operands) -> Any | None:
        return LORA.fused(x, _as_lora(at))

    def by_row(self, y: Any, x: Any, rows: Any, numbers: tuple[int, ...], ats: tuple[Operands, ...]) -> Any | None:
        return LORA.by_row(y, x, rows, numbers, tuple(map(_as_lora, ats)))

    def delta(self, name: str, at: Operands) -> LowRank | Tensor:
        return LORA.delta(name, _as_lora(at))

    def transposed(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        return LORA.transposed(tensors) | {SINGULAR: tensors[SINGULAR]}

    def check(self, site: Site, config: AdaLoraConfig) -> None:
        if site.reading.lookup or site.groups > 1:
            what = "an embedding" if site.reading.lookup else f"a convolution of {site.groups} groups"
            raise ConfigError(f"{site.name} is {what}, for which there is no AdaLoRA; exclude it")

    def remarks(self, selection: Selection, config: AdaLoraConfig) -> Iterator[str]:
        idle = [name for name, default in (("r", 8), ("use_rslora", False)) if getattr(config, name) != default]
        if idle := idle + ["alpha_pattern"] * bool(config.alpha_pattern):
            yield f"{', '.join(map(repr, idle))}: of no effect in AdaLoRA, as in PEFT; `init_r` is the rank at first"

    def tensors(self, site: Site, config: AdaLoraConfig) -> dict[str, Spec]:
        r, columns = config.init_r, site.in_features * math.prod(_kernel(site))
        shapes = {"lora_A": (r, columns), SINGULAR: (r, 1), "lora_B": (site.out_features, r)}
        return {name: Spec(name, shape) for name, shape in shapes.items()}

    def numbers(self, site: Site, config: AdaLoraConfig) -> dict[str, float]:
        return {"scaling": (config.lora_alpha if config.lora_alpha > 0 else config.init_r) / (config.init_r + 1e-5)}

    def init(
        self,
        site: Site,
        config: AdaLoraConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        for tensor in tensors.values():
            nn.init.normal_(tensor, std=0.02 if config.init_lora_weights else 1.0, generator=rng)
        if config.init_lora_weights:
            tensors[SINGULAR].zero_()

    def penalty(self, config: AdaLoraConfig, sites: Iterable[Mapping[str, Tensor]]) -> Tensor | None:
        if not config.orth_reg_weight:
            return None
        return config.orth_reg_weight * _mean_distance([t for at in sites for t in (at["lora_A"], at["lora_B"].mT)])

    def allocator(self, config: AdaLoraConfig) -> Allocator:
        return Allocator()

    def sized(self, config: AdaLoraConfig) -> tuple[str, ...]:
        return "r", "init_r", "target_r", "lora_alpha"

    def of_rank(self, config: AdaLoraConfig, r: int) -> AdaLoraConfig:
        return config.replace(init_r=r)

    def filed(self, config: AdaLoraConfig, tensors: Mapping[str, Tensor]) -> tuple[AdaLoraConfig, dict[str, Tensor]]:
        """Without the directions that the pattern leaves out, but for those that are no zeros, as between allocations.

        What is written then computes what the model does.
        """
        if not config.rank_pattern:
            return config, dict(tensors)
        pattern, kept = dict(config.rank_pattern), dict(tensors)
        for name, mask in config.rank_pattern.items():
            found = _at_site(tensors, name)
            if len(found) == len(_ALONG) and len(found[SINGULAR][1]) == len(mask):
                left = torch.tensor(mask, device=found[SINGULAR][1].device) | (found[SINGULAR][1][:, 0] != 0)
                pattern[name] = left.tolist()
                places = left.nonzero()[:, 0]
                kept |= {key: tensor.index_select(_ALONG[role], places) for role, (key, tensor) in found.items()}
        return config.replace(rank_pattern=pattern), kept

    def unfiled(self, config: AdaLoraConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With zeros for the directions that a file leaves out."""
        whole = dict(tensors)
        for name, mask in (config.rank_pattern or {}).items():
            places = torch.tensor(mask, device="cpu").nonzero()[:, 0]
            for role, (key, tensor) in _at_site(tensors, name).items():
                along = _ALONG[role]
                if tensor.shape[along] == len(places) < len(mask):
                    shape = (*tensor.shape[:along], len(mask), *tensor.shape[along + 1 :])
                    whole[key] = tensor.new_zeros(shape).index_copy_(along, places, tensor)
        return whole


def _as_lora(at: Operands) -> Operands:
    """LoRA's tensors at the site, which are AdaLoRA's with e in A."""
    a, b = aten.mul.Tensor(at.lora_A, at.lora_E), at.lora_B
    if kernel := _kernel(at.site):
        a = aten.view.default(a, [-1, at.site.in_features, *kernel])
        b = aten.view.default(b, [at.site.out_features, -1, *[1] * len(kernel)])
    return replace(at, tensors={"lora_A": a, "lora_B": b})


def _kernel(site: Site) -> tuple[int, ...]:
    return site.weight_shape[2:]


def _mean_distance(factors: list[Tensor]) -> Tensor:
    """How far P Pᵀ is from I, for each P (r, n) on average; rows of zeros, which a file left out, do not count.

    Those of one shape are multiplied at once.
    """
    by_shape: dict[Any, list[Tensor]] = {}
    for factor in factors:
        by_shape.setdefault((factor.shape, factor.dtype, factor.device), []).append(factor)
    total = factors[0].new_zeros(())
    for group in by_shape.values():
        stacked = torch.stack(group)
        identity = torch.diag_embed((stacked != 0).any(-1).to(stacked.dtype))
        total = total + torch.linalg.matrix_norm(stacked @ stacked.mT - identity).sum().to(total)
    return total / len(factors)


def _at_site(tensors: Mapping[str, Tensor], name: str) -> dict[str, tuple[str, Tensor]]:
    """A file's keys and tensors of the site whose e has this name in the pattern, by what they are."""
    site = name.rpartition(f".{SINGULAR}")[0]  # PEFT writes the adapter's name after it in a config that it trains by
    keys = {role: f"base_model.model.{site}.{role}" for role in _ALONG}
    return {role: (key, tensors[key]) for role, key in keys.items() if key in tensors}
