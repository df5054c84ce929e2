"""QA-LoRA (Xu et al., 2023, arXiv 2309.14717, section 3.3): LoRA whose A reads groups of inputs, not single ones.

    y = x Wᵀ + b + s · (pool(dropout(x)) Aᵀ) Bᵀ        pool(x)ⱼ = g · mean of the k inputs of group j, of g = in / k

A is (r, g), with k = `qalora_group_size`. All inputs of a group have one column of A, times g / k: so it is LoRA with
these columns repeated, and its ΔW is one number for each row and group, as the zero points of a quantised weight are.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import ConfigError
from ..site import Site
from .kind import Operands, Spec
from .lora_config import LoraConfig
from .lora_factored import FactoredLora

aten = torch.ops.aten


class QaLora(FactoredLora):
    """What `use_qalora=True` makes of LoRA; see the module's docstring for its equation."""

    variant = "use_qalora"

    def factor(self, role: str, tensor: Any, at: Operands) -> Any:
        if role == "lora_B":
            return tensor
        size = at.config.qalora_group_size
        columns = aten.unsqueeze.default(aten.mul.Tensor(tensor, at.site.in_features / size**2), -1)
        return aten.flatten.using_ints(aten.expand.default(columns, [-1, -1, size]), 1)

    def tensors(self, site: Site, config: LoraConfig) -> dict[str, Spec]:
        specs = super().tensors(site, config)
        rows, columns = specs["lora_A"].shape
        return specs | {"lora_A": specs["lora_A"]._replace(shape=(rows, columns // config.qalora_group_size))}

    def check(self, site: Site, config: LoraConfig) -> None:
        super().check(site, config)
        if site.in_features % config.qalora_group_size:
            raise ConfigError(
                f"{site.name} has {site.in_features} inputs, which are no groups of "
                f"`qalora_group_size={config.qalora_group_size}`; choose another size, or exclude it"
            )
        if config.lora_bias:
            raise ConfigError("`use_qalora` has no `lora_bias`, as in PEFT; leave one of them False")
