"""The site table: where what the adapters act on lies in a tree of modules. Made once, and looked up in each call.

Tensors are looked up anew whenever somebody asks, for a model may have replaced them since.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.site import Site
from ..adapters.storages import DENSE
from ..pipeline import Context
from ..tree.attached import Parents
from ..tree.lookup import module_at
from ..tree.wrappers import innermost
from .call_key import is_of

_TABLES = 16  # so many are kept, the oldest making room: one for each set of acting adapters


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


class OwnRead(NamedTuple):
    """A module whose own forward is one call that reads its weight, as the reading says, and the weight's path."""

    module: nn.Module
    forward: Callable[..., Any]
    weight: str


@dataclass(frozen=True)
class SiteTable:
    """The weights that adapters adapt and the base tensors that they have copies of, by the modules that own them.

    `acting` are the adapters of `context`, with their sites, by the path of the weight; `copies` are the adapters' own
    by the path of the base's tensor; `owned` are weights and replaced tensors by the path of their module. `numbers`
    are those by which rows choose an adapter, if they do. `direct` keeps in `reads` how functions read a weight, and
    `per_site` in `hidden` functions that have read one and did not ask its class. `looked_at` says how many calls of a
    kind were looked at, function by function. Tables for adapters of one form share these two. `parents` tell whether
    the adapters' own modules are still those whose tensors are looked up.
    """

    weights: tuple[Place, ...]
    replaced: tuple[Place, ...]
    copies: dict[str, Place]
    acting: dict[str, tuple[tuple[Adapter, Site], ...]]
    owned: dict[str, tuple[list[Place], list[Place]]]
    context: Context
    parents: tuple[Parents, ...] = ()
    numbers: dict[str, int] = field(default_factory=dict)
    reads: dict[tuple[Any, str], tuple[Any, ...]] = field(default_factory=dict)
    hidden: set[Any] = field(default_factory=set)
    looked_at: Counter[Hashable] = field(default_factory=Counter)

    @classmethod
    def of(cls, tree: nn.Module, context: Context) -> SiteTable:
        """The table of a tree as it is now."""
        acting, copies = _acting(context), _copies(tree, context)
        weights, replaced = (tuple(Place.of(tree, path) for path in paths) for paths in (acting, copies))
        owned: dict[str, tuple[list[Place], list[Place]]] = {}
        for number, places in enumerate((weights, replaced)):
            for place in places:
                owned.setdefault(place.path.rpartition(".")[0], ([], []))[number].append(place)
        return cls(weights, replaced, copies, acting, owned, context, _parents(tree, context), _numbers(context))

    def of_others(self, tree: nn.Module, context: Context) -> SiteTable:
        """The table of other adapters of the same form (`is_like`), in the same modules.

        Where the base's tensors lie, and what calls have taught, is the same, however the adapters are called.
        """
        other = object.__new__(SiteTable)
        named = {"context": context, "acting": _acting(context), "copies": _copies(tree, context)}
        vars(other).update(vars(self), **named, parents=_parents(tree, context), numbers=_numbers(context), reads={})
        for (func, weight), reads in self.reads.copy().items():
            adapters = [adapter for adapter, _ in other.around(weight)]
            other.reads[func, weight] = tuple([each.of_others(tree, adapters) for each in reads])
        return other

    def around(self, weight: str) -> list[tuple[Adapter, Site]]:
        """The adapters whose equations go around what reads a weight: those that act there and are not merged."""
        return [(adapter, site) for adapter, site in self.acting[weight] if adapter.name not in self.context.merged]

    def is_like(self, context: Context) -> bool:
        """Whether it is the table of adapters of the same form, of which the same ones are merged."""
        mine = self.context
        if (len(context.adapters), len(context.numbers)) != (len(mine.adapters), len(mine.numbers)):
            return False  # where rows choose their adapters, weights are read in another way
        pairs = zip(context.adapters, mine.adapters)
        return all(a.is_like(b) and (a.name in context.merged) == (b.name in mine.merged) for a, b in pairs)

    @property
    def is_in_place(self) -> bool:
        """Whether no module of the adapters' has been replaced since."""
        return all(each.are_in_place for each in self.parents)

    @functools.cached_property
    def own_reads(self) -> dict[str, OwnRead]:
        """Of the modules that have weights those whose forward is one call that a reading knows, by path."""
        found = {}
        for place, (_, site) in zip(self.weights, (sites[0] for sites in self.acting.values())):
            forward = type(place.owner).forward
            known = any(function is forward for operator in site.reading.operators for function, _ in operator.calls)
            if known and site.storage == DENSE and not _has_forward_of_its_own(place.owner):
                found[place.path.rpartition(".")[0]] = OwnRead(place.owner, forward, place.path)
        return found

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether equations can be expected to do: layers read one weight each themselves, or a config names the
        parameter, unless rows choose their adapters. A layer may have a forward of its own, and turn out to need a
        graph."""
        first = zip(self.weights, (sites[0][1] for sites in self.acting.values()))
        return all(
            (self.is_named(place.path) and not self.numbers) or _is_a_layer(place.owner, site) for place, site in first
        )

    def is_named(self, weight: str) -> bool:
        """Whether a config names the parameter at this path itself, whose value may be given to any function."""
        return _are_named(self.acting[weight])


def _acting(context: Context) -> dict[str, tuple[tuple[Adapter, Site], ...]]:
    acting: dict[str, tuple[tuple[Adapter, Site], ...]] = {}
    for adapter in context.adapters:
        for site in adapter.selection:
            acting[site.weight] = (*acting.get(site.weight, ()), (adapter, site))
    return acting


def _copies(tree: nn.Module, context: Context) -> dict[str, Place]:
    copies: dict[str, Place] = {}
    for adapter in context.adapters:
        for base, copy in adapter.replaced.items():
            copies.setdefault(base, Place.of(tree, copy))
    return copies


def _parents(tree: nn.Module, context: Context) -> tuple[Parents, ...]:
    return tuple([Parents(ways, ways.modules(tree)) for ways in (adapter.ways for adapter in context.adapters)])


def _numbers(context: Context) -> dict[str, int]:
    return dict(zip((adapter.name for adapter in context.adapters), context.numbers))


def _are_named(sites: tuple[tuple[Adapter, Site], ...]) -> bool:
    return all(site.is_parameter and site.reading.value is not None for _, site in sites)


def _is_a_layer(owner: nn.Module, site: Site) -> bool:
    if site.storage.whole:  # one operator stands for the whole forward
        return True
    is_called = bool(site.reading.operators[0].calls)
    return site.storage == DENSE and is_called and isinstance(owner, site.reading.modules)


def _has_forward_of_its_own(module: nn.Module) -> bool:
    """Whether somebody has given this very module another forward, beneath what lorafx has put there."""
    forward = vars(module).get("forward")
    return forward is not None and "forward" in getattr(forward, "replaced", ("forward",))


class SiteTables:
    """The tables of one adapted model, for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, tuple[str, ...], *tuple[Any, ...]], SiteTable] = OrderedDict()

    def forget(self, adapter: str) -> None:
        """Forget the tables of an adapter, which is deleted."""
        with self._lock:
            for key in [key for key in self._kept if any(is_of(adapter, each) for each in key[1])]:
                del self._kept[key]

    def of(self, tree: nn.Module, context: Context, modules: int) -> SiteTable:
        """The table of a tree whose modules have this number (`tree_state`), for the adapters that act."""
        key = modules, tuple(adapter.call_key for adapter in context.adapters), context.merged, context.numbers
        with self._lock:
            table = self._kept.get(key)
            if table is None or not table.is_in_place:
                table = self._kept[key] = self._made(tree, context, modules)
                if len(self._kept) > _TABLES:
                    self._kept.popitem(last=False)
        return table

    def _made(self, tree: nn.Module, context: Context, modules: int) -> SiteTable:
        known = (each for key, each in self._kept.items() if key[0] == modules and each.is_like(context))
        like = next(known, None)
        return SiteTable.of(tree, context) if like is None else like.of_others(tree, context)
