"""BD-LoRA (Wang et al., 2025, arXiv 2510.23346): LoRA whose A or B is block diagonal, so that it can be sharded.

    y = x Wᵀ + b + s · (dropout(x) A'ᵀ) B'ᵀ        A' = diag(A₁, …, Aₙ) or A,  B' = B or diag(B₁, …, Bₙ)

What is kept are the n blocks one below the other: of A (r, in / n), of B (out, r / n). Which of the two has blocks is
asked of a module's name: A, where it contains one of `target_modules_bd_a`, and B, where one of `target_modules_bd_b`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..site import Site
from .kind import Operands, Spec
from .lora import rank
from .lora_config import LoraConfig
from .lora_factored import FactoredLora

aten = torch.ops.aten


class BdLora(FactoredLora):
    """What `use_bdlora` makes of LoRA; see the module's docstring for its equation."""

    variant = "use_bdlora"

    def factor(self, role: str, tensor: Any, at: Operands) -> Any:
        if role not in _in_blocks(at.site, at.config):
            return tensor
        return _block_diagonal(tensor, at.config.subconfig(self.variant)["nblocks"])

    def tensors(self, site: Site, config: LoraConfig) -> dict[str, Spec]:
        specs, n = super().tensors(site, config), config.subconfig(self.variant)["nblocks"]
        for role in _in_blocks(site, config):
            rows, columns = specs[role].shape
            specs[role] = specs[role]._replace(shape=(rows, columns // n))
        return specs

    def check(self, site: Site, config: LoraConfig) -> None:
        super().check(site, config)
        found, options = _in_blocks(site, config), config.subconfig(self.variant)
        if len(found) > 1:
            raise ConfigError(f"{site.name} is named by both `target_modules_bd_a` and `target_modules_bd_b`")
        if options["match_strict"] and not found:
            raise ConfigError(
                f"{site.name} is named by neither `target_modules_bd_a` nor `target_modules_bd_b`: name it there, or "
                "set `match_strict` to False for LoRA with whole matrices"
            )
        r = rank(site, config)
        sizes = {"lora_A": (r, site.in_features), "lora_B": (site.out_features, r)}
        for role in found:
            if any(size % options["nblocks"] for size in sizes[role]):
                raise ConfigError(
                    f"{site.name}: {role} of shape {sizes[role]} has no {options['nblocks']} diagonal blocks of one "
                    "size; choose another `nblocks`, or `r`"
                )
        if config.lora_bias and "lora_B" in found:
            raise ConfigError(f"{site.name} has a block diagonal B, which has no `lora_bias`, as in PEFT")

    def init(
        self,
        site: Site,
        config: LoraConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> None:
        """As in PEFT, A's blocks are spread wider than LoRA's A, and B's zero whatever `init_lora_weights` says."""
        super().init(site, config, tensors, rng, weight)
        for role in _in_blocks(site, config):
            _ = tensors[role].zero_() if role == "lora_B" else nn.init.kaiming_uniform_(tensors[role], generator=rng)


def _in_blocks(site: Site, config: LoraConfig) -> tuple[str, ...]:
    """Which of A and B is block diagonal at a site."""
    options, name = config.subconfig(BdLora.variant), site.named
    parts = {"lora_A": options["target_modules_bd_a"], "lora_B": options["target_modules_bd_b"]}
    return tuple(role for role, parts_of in parts.items() if any(part in name for part in parts_of or ()))


def _block_diagonal(blocks: Any, n: int) -> Any:
    """(rows, columns) -> (rows, n · columns): the blocks, which lie one below the other, along the diagonal."""
    by_block = aten.permute.default(aten.unflatten.int(blocks, 0, [n, -1]), [1, 2, 0])
    diagonal = aten.permute.default(aten.diag_embed.default(by_block), [2, 0, 3, 1])  # (n, rows / n, n, columns)
    return aten.flatten.using_ints(aten.flatten.using_ints(diagonal, 2), 0, 1)
