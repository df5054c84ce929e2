"""Bounds: before a call, tensors of some kinds are brought back to where they may be (OFT's, with `coft`)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.kinds import Kind
from .penalties import tensors_by_name


def keep_within_bounds(tree: nn.Module, adapters: Iterable[Adapter]) -> None:
    """Write to tensors of these adapters what their kinds bring them back to, in place; most kinds have no bounds.

    As in PEFT an optimizer may leave them, and the next call starts from the bounded values.
    """
    for adapter in adapters:
        if type(adapter.kind).bounded is not Kind.bounded:
            _bring_back(tree, adapter)


@torch.no_grad()
def _bring_back(tree: nn.Module, adapter: Adapter) -> None:
    for site in adapter.tensors:
        tensors = tensors_by_name(tree, adapter, site)
        for name, value in adapter.kind.bounded(adapter.config, tensors).items():
            tensors[name].copy_(value)
