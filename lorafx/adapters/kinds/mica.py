"""MiCA (2026, arXiv 2604.01694): LoRA in the directions that the weight uses least, of which A alone trains.

    y = x Wᵀ + b + s · (dropout(x) Aᵀ) Bᵀ        B: the left singular vectors of W with the r smallest singular values

A starts as zeros, so that the base stays what it is. Of an embedding they are those of Wᵀ.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import ConfigError
from ..readings import CONV1D, EMBEDDING, LINEAR
from ..site import Site
from .kind import Kind, Spec
from .lora import Lora, rank
from .lora_config import LoraConfig


class Mica(Lora):
    """What `init_lora_weights="mica"` makes of LoRA; see the module's docstring for its equation."""

    variant = "mica"
    starts_from_weight = True
    # B is what it is:
    approach = Kind.approach
    since = Kind.since

    def tensors(self, site: Site, config: LoraConfig) -> dict[str, Spec]:
        specs = super().tensors(site, config)
        return specs | {"lora_B": specs["lora_B"]._replace(fixed=True)}

    def sized(self, config: LoraConfig) -> tuple[str, ...]:
        return ()

    def check(self, site: Site, config: LoraConfig) -> None:
        super().check(site, config)
        if site.reading not in (LINEAR, CONV1D, EMBEDDING):
            raise ConfigError(f'{site.name}: `init_lora_weights="mica"` is for linear layers and embeddings')
        if rank(site, config) > (most := min(site.weight_shape)):
            raise ConfigError(f'{site.name}: `init_lora_weights="mica"` gives at most rank {most} there')

    def init(
        self,
        site: Site,
        config: LoraConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        assert weight is not None, "what starts from the weight is given it"
        u, _, _ = torch.linalg.svd(weight.t() if site.reading.transposed else weight, full_matrices=False)
        tensors["lora_A"].zero_()
        tensors["lora_B"].copy_(u[:, -rank(site, config) :])
