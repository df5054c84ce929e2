"""The site table: where what the adapters act on lies in a tree of one layout. Made once, and looked up in each call.

Tensors are looked up anew whenever somebody asks, for a model may have replaced them since.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.site import Site
from ..adapters.storages import DENSE
from ..pipeline import Context
from ..tree.lookup import module_at
from ..tree.wrappers import innermost

_TABLES = 16  # so many are kept, the oldest making room: one for each layout of the tree and set of acting adapters


class Place(NamedTuple):
    """Where a tensor of the tree is: its module, its name there, its path."""

    owner: nn.Module
    name: str
    path: str

    @classmethod
    def of(cls, tree: nn.Module, path: str) -> Place:
        """The place at a path."""
        module, _, name = path.rpartition(".")
        return cls(innermost(module_at(tree, module)), name, path)

    @property
    def tensor(self) -> Tensor:
        """The tensor that is there now."""
        found = self.owner._parameters.get(self.name)
        return getattr(self.owner, self.name) if found is None else found


@dataclass(frozen=True)
class SiteTable:
    """The weights that adapters adapt and the base tensors that they have copies of, by the modules that own them.

    `acting` are the adapters, with their sites, by the path of the weight; `copies` are the adapters' own by the path
    of the base's tensor; `owned` are weights and replaced tensors by the path of their module. `numbers` are
    those by which rows choose an adapter, if they do. `direct` keeps in `reads` how functions read a weight.
    """

    weights: tuple[Place, ...]
    replaced: tuple[Place, ...]
    copies: dict[str, Place]
    acting: dict[str, tuple[tuple[Adapter, Site], ...]]
    owned: dict[str, tuple[list[Place], list[Place]]]
    merged: frozenset[str] = frozenset()
    numbers: dict[str, int] = field(default_factory=dict)
    reads: dict[tuple[Any, str], tuple[Any, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, tree: nn.Module, context: Context) -> SiteTable:
        """The table of a tree as it is now."""
        acting: dict[str, tuple[tuple[Adapter, Site], ...]] = {}
        copies: dict[str, Place] = {}
        for adapter in context.adapters:
            for site in adapter.selection:
                acting[site.weight] = (*acting.get(site.weight, ()), (adapter, site))
            for base, copy in adapter.replaced.items():
                copies.setdefault(base, Place.of(tree, copy))
        weights, replaced = (tuple(Place.of(tree, path) for path in paths) for paths in (acting, copies))
        owned: dict[str, tuple[list[Place], list[Place]]] = {}
        for number, places in enumerate((weights, replaced)):
            for place in places:
                owned.setdefault(place.path.rpartition(".")[0], ([], []))[number].append(place)
        numbers = dict(zip((adapter.name for adapter in context.adapters), context.numbers))
        return cls(weights, replaced, copies, acting, owned, context.merged, numbers)

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether the modules read their weights themselves, by functions that a reading knows, one weight each."""
        first = (sites[0][1] for sites in self.acting.values())
        return all(_reads_plainly(place.owner, site) for place, site in zip(self.weights, first))


def _reads_plainly(owner: nn.Module, site: Site) -> bool:
    if site.storage.whole:  # one operator stands for the whole forward
        return True
    own = {module.forward for module in site.reading.modules}
    return site.storage == DENSE and bool(site.reading.operators[0].calls) and type(owner).forward in own


class SiteTables:
    """The tables of one adapted model."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, SiteTable] = OrderedDict()

    def of(self, tree: nn.Module, context: Context, layout: int) -> SiteTable:
        """The table of a tree whose layout has this number (`tree_state`), for the adapters that act."""
        key = layout, tuple(adapter.call_key for adapter in context.adapters), context.merged, context.numbers
        if key not in self._kept:
            self._kept[key] = SiteTable.of(tree, context)
            if len(self._kept) > _TABLES:
                self._kept.popitem(last=False)
        return self._kept[key]
