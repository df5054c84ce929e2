"""Penalties: what kinds add to the loss that a call of the model gives, while their adapters train (AdaLoRA's)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.kinds import Kind
from ..tree.lookup import tensor_at


def add_penalties(tree: nn.Module, adapters: Iterable[Adapter], result: Any) -> None:
    """Add what the adapters that acted in a call and train add to its `loss`, in place of what is there.

    As in PEFT, a result without a `loss` stays as it is: a tuple, say.
    """
    loss = getattr(result, "loss", None)
    if not isinstance(loss, Tensor):
        return
    for adapter in adapters:
        if type(adapter.kind).penalty is Kind.penalty:
            continue
        penalty = _penalty(tree, adapter, loss.device)
        if penalty is not None:
            result.loss = result.loss + penalty.to(loss)


def _penalty(tree: nn.Module, adapter: Adapter, device: torch.device) -> Tensor | None:
    at_sites = [tensors_by_name(tree, adapter, name) for name in adapter.tensors]
    if not any(tensor.requires_grad for tensors in at_sites for tensor in tensors.values()):
        return None
    with torch.autocast(device.type, enabled=False):  # products in half precision could not tell P Pᵀ from I
        return adapter.kind.penalty(adapter.config, at_sites)


def tensors_by_name(tree: nn.Module, adapter: Adapter, site: str) -> dict[str, Tensor]:
    """The adapter's own tensors at a site, by the kind's names for them."""
    specs = adapter.kind.tensors(adapter.selection.by_name[site], adapter.config)
    return {name: tensor_at(tree, adapter.tensors[site][spec.suffix]) for name, spec in specs.items()}
