"""KaSA (Wang et al., 2024, arXiv 2412.06071, section 3): LoRA with singular values, on a base that lost some.

    y = x W'ᵀ + b + s · ((dropout(x) Aᵀ) ∘ σ) Bᵀ        W' = W without its r smallest singular values; σ (r,)
    penalty = Σ of all sites: β ‖σ‖² + γ (‖Bᵀ B - I‖ + ‖A Aᵀ - I‖)        (equations 9 to 11)

So it is LoRA with A ∘ σ for its A. W' is what is left of the base for good, and it is taken from W again where such an
adapter is loaded. As in PEFT the penalty is no part of a call's loss: a training script adds it, by `get_penalty`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..site import Site
from .kind import Operands, Spec
from .lora import fill, rank
from .lora_config import LoraConfig
from .lora_factored import FactoredLora, at_least_float32

aten = torch.ops.aten


class Kasa(FactoredLora):
    """What `kasa_config` makes of LoRA; see the module's docstring for its equation."""

    variant = "kasa_config"
    adds_penalty = False
    only_beside_its_own = True

    def factor(self, role: str, tensor: Any, at: Operands) -> Any:
        return aten.mul.Tensor(tensor, aten.unsqueeze.default(at.lora_diag, -1)) if role == "lora_A" else tensor

    def tensors(self, site: Site, config: LoraConfig) -> dict[str, Spec]:
        return super().tensors(site, config) | {"lora_diag": Spec("lora_diag", (rank(site, config),))}

    def takes_from_base(self, site: Site, config: LoraConfig) -> bool:
        return True

    def check(self, site: Site, config: LoraConfig) -> None:
        super().check(site, config)
        if site.storage.lossy:
            raise ConfigError(
                f"{site.name}: `kasa_config` takes singular values out of a weight that is not quantised, not one "
                f"stored as {site.storage}; load the base unquantised, or exclude it"
            )
        if rank(site, config) >= (smaller := min(site.in_features, site.out_features)):
            raise ConfigError(
                f"{site.name}: `kasa_config` needs a rank below {smaller}, to leave something of the base"
            )

    def init(
        self,
        site: Site,
        config: LoraConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> Tensor:
        assert weight is not None, "what takes from the base is given it"
        fill(site, config, tensors, rng)
        nn.init.normal_(tensors["lora_diag"], generator=rng)
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        kept = len(s) - rank(site, config)
        return (u[:, :kept] * s[:kept]) @ vh[:kept]

    def penalty(self, config: LoraConfig, sites: Iterable[Mapping[str, Tensor]]) -> Tensor | None:
        options = config.subconfig(self.variant)
        total = None
        for at in sites:
            a, b, diagonal = (at_least_float32(at[name]) for name in ("lora_A", "lora_B", "lora_diag"))
            apart = _from_identity(b.t() @ b) + _from_identity(a @ a.t())
            of_site = options["beta"] * diagonal.square().sum() + options["gamma"] * apart
            total = of_site if total is None else total + of_site.to(total.device)
        return total


def _from_identity(product: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(product - torch.eye(len(product), dtype=product.dtype, device=product.device))
