"""Watch: the Python values that modules and configs hold, which a graph has as constants.

Every call asks whether one of them has changed. So the places to look at are found once, and looking is a comparison of
identities; only what has changed is looked at closely.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import chain
from operator import call, is_, itemgetter
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..graph.description import DEPTH, LARGE, MODULES_OWN, PLAIN, attribute_key

_VALUES = (*PLAIN, list, tuple, dict, set, frozenset)
_NO_CONFIGS = ("torch.", "lorafx.", "transformers.generation", "functools")
_STATES = 256


class Watch:
    """Numbers the states that the attributes of some modules, and of the configs they hold, are seen in."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[Hashable, ...], int] = OrderedDict()
        # The states by number, and the objects that they know by identity, which must live as long.
        self._states: dict[int, tuple[dict[str, Hashable], list[Any]]] = {}
        self._next = 0
        self._dicts: list[dict[str, Any]] = []
        self._values: list[Any] = []
        self._number = -1
        self.modes: tuple[bool, ...] = ()  # whether each module trains; no part of the number

    def look_at(self, root: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Watch these modules from now on, but for how the root's forward is called."""
        self._dicts, self._names = [], []
        self._readers: list[Callable[[dict[str, Any]], Iterable[Any]]] = []
        for path, attributes in _holders(modules):
            names = [n for n in attributes if n not in MODULES_OWN and (n != "forward" or attributes is not vars(root))]
            names *= 2 if len(names) == 1 else 1  # of one name, itemgetter would not give a tuple
            self._dicts.append(attributes)
            self._readers.append(itemgetter(*names) if names else lambda _: ())
            self._names += [f"{path}.{name}".lstrip(".") for name in names]
        self._lengths, self._number = list(map(len, self._dicts)), -1

    def number(self) -> int | None:
        """The number of the state that they are in now; None if attributes have come or gone: look at them anew."""
        if list(map(len, self._dicts)) != self._lengths:
            return None
        try:
            values = list(map(call, self._readers, self._dicts))
        except KeyError:
            return None
        if self._number < 0 or not _equal(values, self._values) or self._filled():
            self._values = values
            self._remember(list(chain.from_iterable(values)))
        return self._number

    def _remember(self, values: list[Any]) -> None:
        named = dict(zip(self._names, values))
        self.modes = tuple(value for name, value in named.items() if _is_mode(name))
        state = {name: attribute_key(value) for name, value in named.items() if not _is_mode(name)}
        key = tuple(state.items())
        if key not in self._seen:
            self._seen[key], self._next = self._next, self._next + 1
            alive = [value for value in values if not isinstance(value, (Tensor, *PLAIN))]
            self._states[self._seen[key]] = state, alive
            if len(self._seen) > _STATES:  # a model that counts its calls is in a new one each time
                del self._states[self._seen.popitem(last=False)[1]]
        self._number = self._seen[key]
        containers = list({id(c): c for value in values for c in _containers(value)}.values())
        self._views = [*containers, *(dict.values(c) for c in containers if isinstance(c, dict))]
        self._sizes, self._items = list(map(len, self._views)), list(chain.from_iterable(self._views))

    def _filled(self) -> bool:
        """Whether something was put into a container, or taken out."""
        if list(map(len, self._views)) != self._sizes:
            return True
        return not all(map(is_, chain.from_iterable(self._views), self._items))

    def changes(self, new: int, old: int) -> Iterator[str]:
        """Names of the attributes in which two states differ, as far as both are remembered."""
        if new in self._states and old in self._states:
            now, before = self._states[new][0], self._states[old][0]
            yield from (name for name in now | before if now.get(name) != before.get(name))


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
    if isinstance(value, (list, tuple, dict, set)) and len(value) > LARGE:
        return
    if isinstance(value, (list, dict, set)) and depth:
        yield value
    if isinstance(value, (list, tuple, dict)) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item, depth - 1)
