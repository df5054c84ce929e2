"""Start values: those of an adapter at a site, and what is left of a base weight that they were taken out of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from .config import AdapterConfig
from .kinds import Kind
from .site import Site

# By site, the tensors that keep what is left of its base weight, as its storage calls them.
Rests = dict[Site, dict[str, Tensor]]


def start_values(
    root: nn.Module, kind: Kind, config: AdapterConfig, site: Site, rng: torch.Generator | None, device: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The kind's start values for a kind of device, by suffix; and the tensors that keep what is left of the weight.

    There are none of the latter for a kind that takes nothing out of it. Raises `AdapterError` if it should be taken
    from a weight without values.
    """
    takes = kind.takes_from_base(site, config)
    where = torch.device("meta" if device == "meta" else "cpu")  # the same random numbers, whatever the device
    weight, stored, dtype = None, {}, torch.float32
    if takes or kind.reads_weight:
        stored = site.storage.stored(root.get_submodule(site.module), site.parameter)
        weight = site.storage.dense(stored).detach()
        if takes and weight.is_meta:
            raise AdapterError(f"{site.weight} has no values here to take start values out of: load the base whole")
        where = weight.device if takes else where
        dtype = torch.promote_types(weight.dtype, torch.float32)
        weight = weight.to(where, dtype)
    specs = kind.tensors(site, config)
    tensors = {name: torch.empty(spec.shape, device=where, dtype=dtype) for name, spec in specs.items()}
    with torch.no_grad():
        rest = kind.init(site, config, tensors, None if where.type == "meta" else rng, weight)
        kept = {} if rest is None else site.storage.packed(rest.double(), stored)
    return {spec.suffix: tensors[name] for name, spec in specs.items()}, kept
