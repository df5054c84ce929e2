"""Heat: how much an adapter changes each weight, for the page's map of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.low_rank import LowRank
from ..adapters.site import Site


@dataclass(frozen=True)
class Heat:
    """An adapter at a site: the shapes and Frobenius norms of its tensors there, by their names in files.

    `change` is the Frobenius norm of what it adds to the weight; None for a kind that does not merely add.
    """

    site: str
    adapter: str
    kind: str
    shapes: dict[str, tuple[int, ...]]
    norms: dict[str, float]
    scaling: float | None
    change: float | None


@torch.no_grad()
def heats(tree: nn.Module, adapters: Iterable[Adapter]) -> Iterator[Heat]:
    """The heat of each adapter at each of its sites."""
    for adapter in adapters:
        for site in adapter.selection:
            tensors = {name: _as_float(tensor) for name, tensor in adapter.tensors_at(tree, site).items()}
            numbers = adapter.numbers(tree, site)
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            norms = {name: _norm(tensor) for name, tensor in tensors.items()}
            change = _change(adapter, site, tensors, numbers)
            kind, scaling = adapter.config.peft_type, numbers.get("scaling")
            yield Heat(site.name, adapter.name, kind, shapes, norms, scaling, change)


def _change(adapter: Adapter, site: Site, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> float | None:
    if not adapter.kind.additive or any(tensor.is_meta for tensor in tensors.values()):
        return None
    delta = adapter.kind.delta("weight", adapter.operands(site, tensors, numbers))
    return delta.norm() if isinstance(delta, LowRank) else _norm(delta)


def _as_float(tensor: Tensor) -> Tensor:
    """In float32; integers, as the places of a sparse update, are what they are."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _norm(tensor: Tensor) -> float:
    return float("nan") if tensor.is_meta else torch.linalg.vector_norm(tensor.float()).item()
