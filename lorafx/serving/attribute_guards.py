"""Attribute guards: whether the Python values that modules and configs hold are still what a graph was captured with.

A graph has these values as constants, so every call asks. The dicts to read are found once; after that, asking is a
comparison of the values with those of the last time, by identity for the most part, and only what has changed is looked
at closely.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import call, is_, itemgetter
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..graph.description import DEPTH, LARGE, MODULES_OWN, PLAIN, attribute_key

_VALUES = (*PLAIN, list, tuple, dict, set, frozenset)  # what an object may hold to be taken for a config
_NO_CONFIGS = ("torch.", "lorafx.", "transformers.generation", "functools")
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
        """The names of the attributes in which two states differ."""
        yield from (name for name in {**self.values, **other.values} if self._differs(other, name))

    def _differs(self, other: AttributeState, name: str) -> bool:
        return self.values.get(name) != other.values.get(name)


class AttributeGuards:
    """Watches the attributes of some modules, and of the configs that they hold."""

    def __init__(self) -> None:
        self._states: OrderedDict[tuple[Hashable, ...], AttributeState] = OrderedDict()
        self._holders: list[dict[str, Any]] = []
        self._values: list[tuple[Any, ...]] = []
        self._now: tuple[AttributeState, tuple[bool, ...]] | None = None

    def watch(self, root: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Watch these modules from now on. The root's `forward` is left out: how it is called is no graph's concern."""
        self._holders, self._names = [], []
        self._readers: list[Callable[[dict[str, Any]], tuple[Any, ...]]] = []
        for path, attributes in _holders(modules):
            names = [n for n in attributes if n not in MODULES_OWN and (n != "forward" or attributes is not vars(root))]
            names *= 2 if len(names) == 1 else 1  # of one name, itemgetter would not give a tuple
            self._holders.append(attributes)
            self._readers.append(itemgetter(*names) if names else lambda _: ())
            self._names += [f"{path}.{name}".lstrip(".") for name in names]
        self._lengths, self._now = list(map(len, self._holders)), None

    def state(self) -> tuple[AttributeState, tuple[bool, ...]] | None:
        """The state that the attributes are in now, and apart from it, whether each module trains.

        None if attributes have come or gone: `watch` is to be called anew.
        """
        if list(map(len, self._holders)) != self._lengths:
            return None
        try:
            values = list(map(call, self._readers, self._holders))
        except KeyError:
            return None
        if self._now is None or not _equal(values, self._values) or self._containers_have_changed():
            self._values = values
            self._now = self._look_closely(list(chain.from_iterable(values)))
        return self._now

    def _look_closely(self, values: list[Any]) -> tuple[AttributeState, tuple[bool, ...]]:
        named = dict(zip(self._names, values))
        training = tuple(value for name, value in named.items() if _is_mode(name))
        described = {name: attribute_key(value) for name, value in named.items() if not _is_mode(name)}
        key = tuple(described.items())
        if key not in self._states:
            alive = tuple(value for value in values if not isinstance(value, (Tensor, *PLAIN)))
            self._states[key] = AttributeState(described, alive)
            if len(self._states) > _STATES:  # a model that counts its calls is in a new state each time
                self._states.popitem(last=False)
        self._remember_containers(values)
        return self._states[key], training

    def _remember_containers(self, values: list[Any]) -> None:
        containers = list({id(c): c for value in values for c in _containers(value)}.values())
        self._views = [*containers, *(dict.values(c) for c in containers if isinstance(c, dict))]
        self._sizes, self._items = list(map(len, self._views)), list(chain.from_iterable(self._views))

    def _containers_have_changed(self) -> bool:
        """Whether something was put into a container, or taken out, since they were remembered."""
        if list(map(len, self._views)) != self._sizes:
            return True
        return not all(map(is_, chain.from_iterable(self._views), self._items))


def _equal(values: list[Any], others: list[Any]) -> bool:
    """Whether they are equal; mostly they are the same objects, and comparing lists finds that out fastest."""
    try:
        return values == others
    except Exception:  # tensors and arrays refuse to say
        return False


def _holders(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The attributes of modules, and of the configs among them or inside those, each once."""
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = list(modules)
    while pending:
        path, holder = pending.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        yield path, vars(holder)
        attributes = [(name, value) for name, value in vars(holder).items() if name not in MODULES_OWN]
        pending += [(f"{path}.{name}", value) for name, value in attributes if _is_config(value)]


def _is_mode(name: str) -> bool:
    return name.rpartition(".")[2] == "training"


def _is_config(value: Any, depth: int = DEPTH) -> bool:
    """Whether an object holds a model's settings: a config of transformers, or what has plain values and no other."""
    if isinstance(value, PreTrainedConfig):
        return True
    if isinstance(value, (nn.Module, Tensor, type)) or type(value).__module__.startswith(_NO_CONFIGS):
        return False
    values = list(vars(value).values()) if hasattr(value, "__dict__") and depth else []
    return bool(values) and all(isinstance(v, _VALUES) or _is_config(v, depth - 1) for v in values)


def _containers(value: Any, depth: int = DEPTH) -> Iterator[Any]:
    """The containers that a value is, or that are within it, as far as they can be filled and are looked into."""
    if isinstance(value, (list, tuple, dict, set)) and len(value) > LARGE:
        return
    if isinstance(value, (list, dict, set)) and depth:
        yield value
    if isinstance(value, (list, tuple, dict)) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item, depth - 1)
