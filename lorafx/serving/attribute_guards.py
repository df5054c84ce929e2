"""Attribute guards: whether the Python values that modules and configs hold are still what a graph was captured with.

A graph has these values as constants, so every call asks. The dicts to read are found once; after that, asking is a
comparison of the values with those of the last time, by identity for the most part, and only what has changed is looked
at closely.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import call, itemgetter
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..graph.description import attribute_key, held_key
from ..tree.holdings import Holding, all_holdings, attributes_noted, noted, same
from ..tree.settings import settings_of

_IMMUTABLE = (tuple, frozenset, MethodType, partial)  # they hold the same for as long as they live
MODE = "training"  # which is apart from all other attributes: it changes all the time, and each state comes again
_ENVIRONMENT = "os.environ["
_STATES = 256  # so many states are remembered, the oldest making room


@dataclass(frozen=True, eq=False)
class AttributeState:
    """The attributes of a tree's modules and configs at one time. Equal states are one object while it is remembered.

    `values` describes them by name. A description may hold an object's identity, so the objects are kept `alive` as
    long as the state: no other object can have the same identity meanwhile.
    """

    values: Mapping[str, Hashable]
    alive: tuple[Any, ...]

    def differences(self, other: AttributeState) -> Iterator[str]:
        """The names of the attributes in which two states differ, and of environment variables that both know of."""
        yield from (name for name in {**self.values, **other.values} if self._differs(other, name))

    def _differs(self, other: AttributeState, name: str) -> bool:
        if name.startswith(_ENVIRONMENT) and not (name in self.values and name in other.values):
            return False  # it is watched since a graph was captured that reads it
        return self.values.get(name) != other.values.get(name)


class AttributeGuards:
    """Watches the settings of some modules, and all that these hold."""

    def __init__(self) -> None:
        self._states: OrderedDict[tuple[Hashable, ...], AttributeState] = OrderedDict()
        self._holders: list[Mapping[str, Any]] = []
        self._values: list[Any] = []
        self._watched: list[Holding] = []
        self._held: list[Any] = []
        self._now: AttributeState | None = None

    def watch(self, root: nn.Module, modules: Iterable[tuple[str, nn.Module]], environment: Iterable[str] = ()) -> None:
        """Watch these modules, and these environment variables, from now on.

        The root's `forward` is left out: how it is called is no graph's concern.
        """
        self._holders, self._names = [], []
        self._modes: list[Mapping[str, Any]] = []  # those that may train
        self._readers: list[Callable[[Mapping[str, Any]], tuple[Any, ...]]] = []
        self._objects: list[Any] = []
        self._apart: set[int] = set()  # ids of the objects whose attributes are watched by their names
        self._of_modules: set[str] = set()
        for path, holder, names in settings_of(modules):
            attributes = vars(holder)
            self._objects.append(holder)
            self._apart.add(id(holder))
            self._modes += [attributes] if MODE in names else []
            names = [name for name in names if name != MODE and (name != "forward" or attributes is not vars(root))]
            names *= 2 if len(names) == 1 else 1  # of one name, itemgetter would not give a tuple
            self._holders.append(attributes)
            self._readers.append(itemgetter(*names) if names else lambda _: ())
            full = [f"{path}.{name}".lstrip(".") for name in names]
            self._names += full
            self._of_modules.update(full if isinstance(holder, nn.Module) else ())
        if names := list(environment):
            self._holders.append(os.environ)
            self._readers.append(lambda variables: tuple(map(variables.get, names)))
            self._names += [f"{_ENVIRONMENT}{name!r}]" for name in names]
        self._lengths, self._now = list(map(len, self._holders)), None

    def state(self) -> tuple[AttributeState, tuple[bool, ...]] | None:
        """The state that the attributes are in now, and apart from it, whether each module trains.

        None if attributes have come or gone: `watch` is to be called anew.
        """
        if list(map(len, self._holders)) != self._lengths:
            return None
        try:
            training = tuple(map(itemgetter(MODE), self._modes))
            values = list(chain.from_iterable(map(call, self._readers, self._holders)))
            if self._now is None or not same(values, self._values) or not same(self._held_now(), self._held):
                self._values, self._now = values, self._look_closely(values)
        except (KeyError, AttributeError, ValueError):  # a variable or attribute of something held was deleted
            return None
        return self._now, training

    def held_tensors(self) -> Iterator[Tensor]:
        """The tensors among what was watched when `state` was last asked for, without parameters."""
        return (value for value in (*self._values, *self._held) if type(value) is Tensor)

    def noted(self) -> Callable[[], None]:
        """Take note of the attributes, and of what they hold at any depth. Calling the result puts all that back."""
        put_back_attributes, put_back_held = attributes_noted(self._objects), noted(self._watched)

        def put_back() -> None:
            put_back_attributes()
            put_back_held()

        return put_back

    def _look_closely(self, values: list[Any]) -> AttributeState:
        alive: list[Any] = []
        described = {
            name: (attribute_key if name in self._of_modules else held_key)(value, alive, self._apart)
            for name, value in dict(zip(self._names, values)).items()
        }
        key = tuple(described.items())
        if key not in self._states:
            self._states[key] = AttributeState(described, tuple(alive))
            if len(self._states) > _STATES:  # a model that counts its calls is in a new state each time
                self._states.popitem(last=False)
        holdings = all_holdings(values, self._apart)
        self._watched = [holding for holding in holdings if not isinstance(holding.of, _IMMUTABLE)]
        self._held = self._held_now()
        return self._states[key]

    def _held_now(self) -> list[Any]:
        return list(chain.from_iterable(holding.read(holding.of) for holding in self._watched))
