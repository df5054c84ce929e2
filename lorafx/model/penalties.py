"""Penalties: what kinds add to the loss that a call of the model gives, while their adapters train (AdaLoRA's)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.kinds import Kind
from ..tree.lookup import tensor_at
from .part import Part


def add_penalties(tree: nn.Module, adapters: Iterable[Adapter], result: Any) -> None:
    """Add what the adapters that acted in a call and train add to its `loss`, in place of what is there.

    As in PEFT, a result without a `loss` stays as it is: a tuple, say.
    """
    loss = getattr(result, "loss", None)
    if not isinstance(loss, Tensor):
        return
    for adapter in adapters:
        if type(adapter.kind).penalty is Kind.penalty or not adapter.kind.adds_penalty:
            continue
        sites = _at_sites(tree, adapter)
        if not any(tensor.requires_grad for tensors in sites for tensor in tensors.values()):
            continue
        penalty = _penalty(adapter, sites)
        if penalty is not None:
            result.loss = result.loss + penalty.to(loss)


class Penalties(Part):
    """The part of an adapted model that gives the penalties which are for a training script to add to its loss."""

    def get_penalty(self, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
        """What these adapters' kinds have a training script add to its loss: one number, 0.0 if they have nothing.

        `adapter_names` are the active ones if None. It is what `kasa_config` and `monteclora_config` weigh; kinds whose
        penalty is in a call's loss already, as AdaLoRA's, have nothing. Raises `AdapterError` for an unknown name.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        adapters = [self._adapter(name) for name in (self._lorafx.active if names is None else names)]
        asked = [each for each in adapters if not each.kind.adds_penalty]
        found = [_penalty(adapter, _at_sites(self.tree, adapter)) for adapter in asked]
        return sum((penalty for penalty in found if penalty is not None), start=0.0)


def _at_sites(tree: nn.Module, adapter: Adapter) -> list[dict[str, Tensor]]:
    return [tensors_by_name(tree, adapter, name) for name in adapter.tensors]


def _penalty(adapter: Adapter, sites: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
    device = next((tensor.device for tensors in sites for tensor in tensors.values()), torch.device("cpu"))
    with torch.autocast(device.type, enabled=False):  # products in half precision could not tell P Pᵀ from I
        return adapter.kind.penalty(adapter.config, sites)


def tensors_by_name(tree: nn.Module, adapter: Adapter, site: str) -> dict[str, Tensor]:
    """The adapter's own tensors at a site, by the kind's names for them."""
    specs = adapter.kind.tensors(adapter.selection.by_name[site], adapter.config)
    return {name: tensor_at(tree, adapter.tensors[site][spec.suffix]) for name, spec in specs.items()}
