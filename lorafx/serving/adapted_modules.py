"""Adapted modules: whether they are still what an adapter was put beside, for somebody may have changed the model."""

from __future__ import annotations

from torch import nn

from ..adapters.site import Site
from ..adapters.storages import require_not_packed_since
from ..errors import AdapterError
from ..tree.lookup import module_at
from ..tree.wrappers import innermost, is_fsdp1
from .call_key import Call


def require_adapted_modules(call: Call, fit: set[str]) -> None:
    """Raise `AdapterError` if modules that an adapter hangs below, or the weights there, have been replaced since.

    `fit` are the paths of those whose weights were looked at before, in a tree of the same layout.
    """
    for adapter in call.context.adapters:
        adapter.require_in_place(call.tree)
        sites = [site for site in adapter.selection if site.module not in fit]
        computed = [site.name for site in sites if _is_computed(call.tree, site)]
        if computed:
            raise AdapterError(
                f"{', '.join(computed)}: the weight that the adapter {adapter.name!r} adapts is no tensor of its module"
                " any more, as when it is parametrized, normed or pruned; undo that, or delete the adapter"
            )
        require_not_packed_since(call.tree, sites)
        fit.update(site.module for site in sites)


def _is_computed(tree: nn.Module, site: Site) -> bool:
    """Whether a site's module has no such tensor of its own since, but computes its weight.

    FSDP1 has whole ones there while it runs, and says so nowhere.
    """
    if site.storage.whole:
        return False
    owner = innermost(module_at(tree, site.module))
    missing = owner._parameters.get(site.parameter) is None and owner._buffers.get(site.parameter) is None
    return missing and not any(map(is_fsdp1, tree.modules()))
