"""Redirection: what a mirror's modules hold refers to the mirror, where the original's refers to the original.

A model may reach its own layers otherwise than by its module tree: by a list, a closure, a bound method, an object of
somebody's own. In a mirror these must lead to the mirror's layers, for only there are adapters.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import networkx as nx
from torch import nn

from .holdings import PLAIN, holdings, is_empty

_TWIN = "twin"  # the node that every module with a twin leads to


class Redirection:
    """Gives each value with twins in the place of the modules that it refers to, at any depth.

    `twins` are the mirror's modules, by the id of the originals; `values` all that is going to be asked for. What
    refers to no original stays the same object; anything else is copied, once.
    """

    def __init__(self, twins: Mapping[int, nn.Module], values: Iterable[Any]):
        self.twins = twins
        self._made: dict[int, Any] = {}
        references = nx.DiGraph((twin, _TWIN) for twin in twins)
        pending, self._seen = list(values), dict[int, Any]()
        while pending:
            value = pending.pop()
            if isinstance(value, PLAIN) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            for inside in _referred(value):
                references.add_edge(id(value), id(inside))
                pending.append(inside)
        self._concerned = nx.ancestors(references, _TWIN) if twins else set()

    def __call__(self, value: Any) -> Any:
        """The value as the mirror holds it."""
        if id(value) in self.twins:
            return self.twins[id(value)]
        if _is_served(value):
            return self._own_forward(value)
        if id(value) not in self._concerned:
            return value
        if id(value) not in self._made:
            self._made[id(value)] = self._copied(value)
        return self._made[id(value)]

    def _own_forward(self, served: Any) -> Any:
        """What serves calls of a part of the original, as somebody holds it who has wrapped that, is the twin's own."""
        if (twin := self.twins.get(id(served.module))) is None:
            return served
        own = served.replaced.get("forward")
        return MethodType(type(twin).forward, twin) if own is None else self(own)

    def _copied(self, value: Any) -> Any:
        if isinstance(value, MethodType):
            return MethodType(self(value.__func__), self(value.__self__))
        if isinstance(value, weakref.ref):
            return weakref.ref(self(value()))
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, functools.partial):
            other = type(value)(self(value.func), *map(self, value.args))
            other.keywords.update({name: self(item) for name, item in value.keywords.items()})
            other.__dict__.update({name: self(item) for name, item in vars(value).items()})
            return other
        if isinstance(value, (tuple, frozenset)):
            return value._make(map(self, value)) if hasattr(value, "_make") else type(value)(map(self, value))
        try:
            other = self._made[id(value)] = copy.copy(value)  # noted before its contents, which may lead back to it
        except Exception:  # it refuses to be copied, whatever it says
            return value
        return self._filled(other, value)

    def _filled(self, other: Any, value: Any) -> Any:
        """The copy of a container or object, with what the original has, redirected."""
        if isinstance(value, dict):
            other.update({key: self(item) for key, item in value.items()})
        elif isinstance(value, (list, deque)):
            items = [self(item) for item in value]
            other.clear()
            other.extend(items)
        elif isinstance(value, set):
            other.clear()
            other.update(map(self, value))
        for name in vars(value) if hasattr(value, "__dict__") else ():
            other.__dict__[name] = self(vars(value)[name])
        for holding in holdings(value):
            for name in holding.names:  # of slots
                object.__setattr__(other, name, self(getattr(value, name)))
        return other

    def _function(self, function: FunctionType) -> FunctionType:
        cells = {id(cell): CellType() if self._changes(cell) else cell for cell in function.__closure__ or ()}
        closure = tuple(cells[id(cell)] for cell in function.__closure__ or ()) or None
        other = FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
        self._made[id(function)] = other  # noted before its variables, for one may be the function itself
        functools.update_wrapper(other, function, updated=())
        other.__dict__.pop("__wrapped__", None)
        other.__dict__.update({name: self(value) for name, value in vars(function).items()})
        other.__defaults__ = self(function.__defaults__)
        other.__kwdefaults__ = self(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            if cells[id(cell)] is not cell:
                cells[id(cell)].cell_contents = self(cell.cell_contents)
        return other

    def _changes(self, cell: CellType) -> bool:
        """Whether a variable refers to an original. Functions that share a variable which does not go on sharing it."""
        return not is_empty(cell) and id(cell.cell_contents) in self._concerned


def _is_served(value: Any) -> bool:
    """Whether this is a forward that serves the calls of a part of an adapted model."""
    return getattr(type(value), "lorafx", False) is True and hasattr(value, "path")


def _referred(value: Any) -> Iterator[Any]:
    """What a value refers to and could refer to otherwise: globals stay what they are."""
    if isinstance(value, weakref.ref):
        yield value()
        return
    if _is_served(value):
        yield value.module
    for holding in holdings(value):
        if not (isinstance(value, FunctionType) and isinstance(holding.of, dict) and holding.names):
            yield from holding.values()
