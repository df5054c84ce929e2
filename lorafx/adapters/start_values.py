"""Start values: those of an adapter at a site, and what is left of a base weight that they were taken out of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..tree.lookup import tensor_at
from .adapter import Adapter
from .config import AdapterConfig
from .kinds import Kind, Spec
from .notes import pass_on
from .site import Site

# By site, the tensors that keep what is left of its base weight, as its storage calls them.
Rests = dict[Site, dict[str, Tensor]]


def start_values(
    root: nn.Module,
    kind: Kind,
    config: AdapterConfig,
    site: Site,
    rng: torch.Generator | None,
    device: str,
    *,
    from_weight: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The kind's start values for a kind of device, by suffix; and the tensors that keep what is left of the weight.

    There are none of the latter for a kind that takes nothing out of it. Without `from_weight` the kind is not given
    the weight, for tensors that do not depend on it. Raises `AdapterError` if it should be taken from a weight without
    values.
    """
    takes = kind.takes_from_base(site, config)
    where = torch.device("meta" if device == "meta" else "cpu")  # the same random numbers, whatever the device
    weight, stored, dtype = None, {}, torch.float32
    if from_weight and (takes or kind.needs_weight(site) or kind.starts_from_weight):
        stored = site.storage.stored(root.get_submodule(site.module), site.parameter)
        weight = site.storage.dense(stored).detach()
        if weight.is_meta and (takes or where.type != "meta"):
            raise AdapterError(f"{site.weight} has no values here to take start values out of: load the base whole")
        where = weight.device if takes else where
        dtype = torch.promote_types(weight.dtype, torch.float32)
        weight = weight.to(where, dtype)
        pass_on(tensor_at(root, site.weight), weight)
    specs = kind.tensors(site, config)
    with where, torch.no_grad():  # whatever device somebody has made the default
        tensors = {name: torch.empty(spec.shape, dtype=spec.dtype or dtype) for name, spec in specs.items()}
        rest = kind.init(site, config, tensors, None if where.type == "meta" else rng, weight)
        kept = {} if rest is None else site.storage.packed(rest.double(), stored)
    return {spec.suffix: tensors[name] for name, spec in specs.items()}, kept


def drawn(kind: Kind, config: AdapterConfig, shared: Mapping[str, Spec]) -> dict[str, Tensor]:
    """What sites share, by suffix, in float32 on the CPU: the same, whatever the base's dtype and device."""
    with torch.device("cpu"):  # whatever device somebody has made the default
        tensors = {name: torch.empty(spec.shape, dtype=spec.dtype or torch.float32) for name, spec in shared.items()}
        kind.draw(config, tensors)
    return {spec.suffix: tensors[name] for name, spec in shared.items()}


def completed(root: nn.Module, adapter: Adapter, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of an adapter's file, by path, with those that files do not have: at all sites, and made again."""
    found, shared = dict(values), adapter.shared
    made = drawn(adapter.kind, adapter.config, shared) if not all(spec.saved for spec in shared.values()) else {}
    for spec in shared.values():
        places = [adapter.tensors[site.name][spec.suffix] for site in adapter.selection]
        found |= dict.fromkeys(places, found[places[0]] if spec.saved else made[spec.suffix])
    for site in adapter.selection:
        paths = adapter.tensors[site.name]
        found |= {paths[suffix]: value for suffix, value in unsaved(root, adapter, site).items()}
    return found


def unsaved(root: nn.Module, adapter: Adapter, site: Site) -> dict[str, Tensor]:
    """What no file has of a site's tensors, by suffix, with its values on the CPU: the config says them."""
    lacking = [spec.suffix for spec in adapter.kind.tensors(site, adapter.config).values() if not spec.saved]
    if not lacking:
        return {}
    rng, kind = torch.Generator(), adapter.kind
    start, _ = start_values(root, kind, adapter.config, site, rng, "cpu", from_weight=False)
    return {suffix: start[suffix] for suffix in lacking}
