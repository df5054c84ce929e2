"""LoRA (Hu et al., 2021, arXiv 2106.09685, section 4.1).

    y = x Wᵀ + b + s · (dropout(x) Aᵀ) Bᵀ        s = α / r, or α / √r with `use_rslora` (arXiv 2312.03732)

A is (r, in) and B is (out, r), so ΔW = s · B A. An embedding looks up columns of A. In a convolution A has the base
layer's kernel size, stride, padding and dilation, and B a kernel of size 1 and the base layer's groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, MergeError
from ...ops import lora_linear
from ...ops.modes import autocast_dtype
from ..config import is_pattern_of
from ..readings import IN_PROJ, LINEAR
from ..site import Selection, Site
from .kind import Kind, Operands, Spec
from .lora_config import LoraConfig

aten = torch.ops.aten


class Lora(Kind):
    """The LoRA kind; see the module's docstring for its equation."""

    config = LoraConfig
    additive = True

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        hidden = at.narrow(at.dropout(x, at.config.lora_dropout), at.lora_A)
        update = at.wide(hidden, at.lora_B, at.tensors.get("lora_bias"))
        return aten.add.Tensor(y, aten.mul.Tensor(update, at.scaling))

    def fused(self, x: Any, at: Operands) -> Any | None:
        if at.operator is not LINEAR.operators[0] or "lora_bias" in at.tensors:
            return None
        weight, a, b, s = at.bound["weight"], at.lora_A, at.lora_B, at.scaling
        if not x.dtype == weight.dtype == a.dtype == b.dtype or autocast_dtype(x.device.type) not in (None, x.dtype):
            return None
        if isinstance(s, Tensor):
            b, s = b * s, 1.0
        return lora_linear(x, weight, at.bound["bias"], None, a, b, s, at.config.lora_dropout if at.training else 0.0)

    def delta(self, name: str, at: Operands) -> Tensor:
        return (at.product(at.lora_A, at.lora_B) if name == "weight" else at.lora_bias) * at.scaling

    def changes(self, site: Site, config: LoraConfig) -> tuple[str, ...]:
        if site.groups > 1:
            raise MergeError(
                f"{site.name} is a convolution with groups={site.groups}: A mixes what its groups keep apart, so the "
                "adapter is no change of its weight and cannot be merged"
            )
        return ("weight", "bias") if config.lora_bias else ("weight",)

    def transposed(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """(B A)ᵀ = Aᵀ Bᵀ: A and B trade places; there is no bias, which belongs to the weight as it is stored."""
        return {"lora_A": aten.t.default(tensors["lora_B"]), "lora_B": aten.t.default(tensors["lora_A"])}

    def tensors(self, site: Site, config: LoraConfig) -> dict[str, Spec]:
        a, b = site.reading.factors(site.weight_shape, site.groups, rank(site, config))
        if site.reading.lookup:
            return {"lora_A": Spec("lora_embedding_A", a), "lora_B": Spec("lora_embedding_B", b)}
        specs = {"lora_A": Spec("lora_A.weight", a), "lora_B": Spec("lora_B.weight", b)}
        return specs | (
            {"lora_bias": Spec("lora_B.bias", (site.out_features,), of_bias=True)} if config.lora_bias else {}
        )

    def numbers(self, site: Site, config: LoraConfig) -> dict[str, float]:
        r, alpha = rank(site, config), pattern_value(config.alpha_pattern, site.named, config.lora_alpha)
        return {"scaling": alpha / (math.sqrt(r) if config.use_rslora else r)}

    def check(self, site: Site, config: LoraConfig) -> None:
        if site.reading.lookup and config.lora_bias:
            raise ConfigError(f"{site.name} is an embedding, which has no `lora_bias`; exclude it or leave it False")
        if site.reading == IN_PROJ and config.lora_bias:
            raise ConfigError(
                f"{site.name} packs three weights, which have no `lora_bias`; exclude it or leave it False"
            )
        if rank(site, config) % site.groups:
            raise ConfigError(
                f"{site.name} has groups={site.groups}, and rank {rank(site, config)} is no multiple of it; "
                "choose another `r` or a `rank_pattern` for it"
            )

    def remarks(self, selection: Selection, config: LoraConfig) -> Iterator[str]:
        names = [site.named for site in selection]
        for field in ("rank_pattern", "alpha_pattern"):
            idle = [key for key in getattr(config, field) if not any(is_pattern_of(key, name) for name in names)]
            if idle:
                shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
                yield f"`{field}` keys that match no adapted module: {idle} (they are regexes for the ends of {shown})"
        if bare := [site.name for site in selection if config.lora_bias and not site.has_bias]:
            yield (
                f"`lora_bias` adds a bias to {len(bare)} layers without one, such as {bare[0]}: the adapter acts "
                "there, and cannot be merged"
            )

    def init(
        self,
        site: Site,
        config: LoraConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        a, b = tensors["lora_A"], tensors["lora_B"]
        if site.reading.lookup:
            nn.init.normal_(b, generator=rng)
            _ = nn.init.zeros_(a) if config.init_lora_weights else nn.init.normal_(a, generator=rng)
            return
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / rank(site, config), generator=rng)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=rng)
        bound = 1 / math.sqrt(b[0].numel())
        for tensor in (b, tensors["lora_bias"]) if "lora_bias" in tensors else (b,):
            if config.init_lora_weights:
                nn.init.zeros_(tensor)
            else:
                nn.init.uniform_(tensor, -bound, bound, generator=rng)


def rank(site: Site, config: LoraConfig) -> int:
    """The rank at a site: the first match in `rank_pattern`, else the config's `r`."""
    return int(pattern_value(config.rank_pattern, site.named, config.r))


def pattern_value(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern that matches the end of `name`, as PEFT matches them; else `default`."""
    return next((v for key, v in patterns.items() if is_pattern_of(key, name)), default)
