"""LoRA with other factors: variants whose A and B are not an adapter's tensors, but are made of them.

    y = x Wᵀ + b + s · (dropout(x) A'ᵀ) B'ᵀ        A' = factor("lora_A", A), B' = factor("lora_B", B)

A' is (r, in) and B' (out, r), so that everything LoRA does is done with them: its operators, merging, rows of a batch.
To make them costs about as much as to read A and B, and a call's tokens are many more than the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ..low_rank import LowRank
from ..readings import CONV1D, LINEAR
from ..site import Site
from .kind import Kind, Operands
from .lora import Lora
from .lora_config import LoraConfig

aten = torch.ops.aten
_OTHER = {"lora_A": "lora_B", "lora_B": "lora_A"}


class FactoredLora(Lora):
    """A variant of LoRA on linear layers; a subclass says what A and B are made of by `factor`."""

    # What LoRA does with A and B as they are kept:
    approach = Kind.approach
    since = Kind.since

    def factor(self, role: str, tensor: Any, at: Operands) -> Any:
        """A' (r, in) of A, or B' (out, r) of B: `role` is "lora_A" or "lora_B", `tensor` as it is kept."""
        raise NotImplementedError

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        return super().after(y, x, self._as_lora(at))

    def fused(self, x: Any, at: Operands) -> Any | None:
        return super().fused(x, self._as_lora(at))

    def by_row(self, y: Any, x: Any, rows: Any, numbers: tuple[int, ...], ats: tuple[Operands, ...]) -> Any | None:
        return super().by_row(y, x, rows, numbers, tuple(map(self._as_lora, ats)))

    def delta(self, name: str, at: Operands) -> LowRank | Tensor:
        return super().delta(name, self._as_lora(at))

    def transposed(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        beside = {name: tensor for name, tensor in tensors.items() if name not in (*_OTHER, "lora_bias")}
        return super().transposed(tensors) | beside

    def sized(self, config: LoraConfig) -> tuple[str, ...]:
        return ()

    def check(self, site: Site, config: LoraConfig) -> None:
        super().check(site, config)
        if site.reading not in (LINEAR, CONV1D):
            raise ConfigError(
                f"{site.name} is read by {site.reading}, and `{self.variant}` is for linear layers: narrow "
                "`target_modules`, or add it to `exclude_modules`"
            )
        if not isinstance(init := config.init_lora_weights, bool):
            raise ConfigError(f"`{self.variant}` needs `init_lora_weights` True or False, not {init!r}")

    def _as_lora(self, at: Operands) -> Operands:
        """LoRA's tensors at the site; where the weight is read transposed, A and B lie there transposed, too."""
        made = {}
        for role, other in _OTHER.items():
            place = other if at.is_turned else role
            kept = aten.t.default(at.tensors[place]) if at.is_turned else at.tensors[place]
            factor = self.factor(role, kept, at)
            made[place] = aten.t.default(factor) if at.is_turned else factor
        return replace(at, tensors={**at.tensors, **made})


def at_least_float32(tensor: Tensor) -> Tensor:
    """A tensor of float32 or wider, for a penalty, which half precision is too coarse for."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
