"""What a Python value holds: one account for all who look into what a model's modules hold.

A mirror redirects references to the modules that it mirrors, guards watch whether values are still those that a graph
was captured with, and a capture must leave everything as it was. A layer may be held by a list, a closure or an object
of somebody's own; so may a number that a model computes with.
"""

from __future__ import annotations

import functools
import pickle
import random
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from contextvars import ContextVar
from itertools import count, repeat
from operator import attrgetter, is_, itemgetter, length_hint
from types import CellType, FunctionType, GeneratorType, MappingProxyType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.Size)
CONTAINERS = (list, tuple, dict, set, frozenset, deque)
LARGE = 4096  # the length from which a container is not looked into: a vocabulary, say, and no setting
_CLOSED = (*PLAIN, Tensor, nn.Module, type, ModuleType)  # they hold nothing, or are looked into by other ways
_DESCRIPTORS = {property: ("fget",), staticmethod: ("__func__",), classmethod: ("__func__",)}
# Objects of these are no settings of a model: they log, store, generate or train, and hold half the program.
_MACHINERY = ("torch", "lorafx", "numpy", "transformers.generation", "transformers.tokenization_", "tokenizers")
_SETTINGS = ("types", "collections", "argparse", "torch.distributions", "__main__")
# Arrays, and sources of random numbers besides torch's, with what tells what they hold or will give next, and puts
# that back.
_STATES: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], None]]] = {
    numpy.ndarray: (
        lambda array: array.tobytes(),
        lambda array, state: None if array.dtype.hasobject else numpy.copyto(array, _array_like(array, state)),
    ),
    random.Random: (lambda generator: generator.getstate(), lambda generator, state: generator.setstate(state)),
    numpy.random.Generator: (
        lambda generator: generator.bit_generator.state,
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    ),
    numpy.random.RandomState: (
        lambda generator: generator.get_state(),
        lambda generator, state: generator.set_state(state),
    ),
}
_ITERATORS: tuple[type, ...] = (
    *(GeneratorType, count, type(iter(range(0)))),
    *(type(iter(kind())) for kind in (list, tuple, dict, set, deque)),
)
_STDLIB = str(sysconfig.get_path("stdlib"))


class Holding(NamedTuple):
    """One thing that holds values, and how they are read: `read(of)` gives those that are in there now.

    `names` are theirs, where a name is all by which they can be put back.
    """

    read: Callable[[Any], Iterable[Any]]
    of: Any
    names: tuple[str, ...] = ()

    def values(self) -> Iterable[Any]:
        """What is held now."""
        return self.read(self.of)


def holdings(value: Any) -> list[Holding]:
    """What in a value holds other values, in a form that is fast to read again and again.

    Of a container, what is in it; of an object, its attributes; of a function, what it closes over, its defaults and
    the globals that it names; of a class that is somebody's own, its attributes; of a method or `functools.partial`,
    what it is bound to; of a small array or a source of random numbers, its state. Of a tensor or module nothing, nor
    of objects that belong to a library's machinery rather than to a model.
    """
    if isinstance(value, type) and not is_library(value.__module__):
        return [_by_names(itemgetter, vars(value), names)] if (names := own_names(value)) else []
    if isinstance(value, _CLOSED):
        return []
    if isinstance(value, tuple(_STATES)):
        return [] if getattr(value, "nbytes", 0) > LARGE * 16 else [Holding(_state, value)]
    if isinstance(value, _ITERATORS):
        return [Holding(_progress, value)]
    if isinstance(value, ContextVar):
        return [Holding(_in_this_context, value)]
    if isinstance(value, threading.local):
        return [Holding(dict.values, vars(value))]
    if isinstance(value, FunctionType):
        return list(_of_function(value))
    if isinstance(value, MethodType):
        return [_by_names(attrgetter, value, ["__self__", "__func__"])]
    if isinstance(value, functools.partial):
        return [_by_names(attrgetter, value, ["func", "args", "keywords"]), *_of_attributes(value)]
    if type(value) in _DESCRIPTORS:
        return [_by_names(attrgetter, value, _DESCRIPTORS[type(value)])]
    if getattr(type(value), "lorafx", False) is True:  # it stands before a forward of somebody's own
        return [Holding(dict.values, value.replaced)]
    if isinstance(value, CONTAINERS):
        inside = [] if len(value) > LARGE else [Holding(iter, value)]
        inside += [Holding(dict.values, value)] if inside and isinstance(value, dict) else []
        return inside + _of_attributes(value)
    return _of_attributes(value) if is_looked_into(value) else []


def all_holdings(values: Iterable[Any], apart: Container[int] = ()) -> Iterator[Holding]:
    """What holds values within these values, at any depth, each once.

    Objects whose `id` is in `apart` are not looked into.
    """
    seen: dict[int, Any] = {}  # the values are kept, so that none that is made on the way takes another's `id`
    pending = list(values)
    while pending:
        value = pending.pop()
        if id(value) in seen or id(value) in apart or isinstance(value, PLAIN):
            continue
        seen[id(value)] = value
        for holding in holdings(value):
            yield holding
            pending += holding.values()


def leads_to(value: Any, is_target: Callable[[Any], bool]) -> bool:
    """Whether a value is a certain one, or holds it at any depth."""
    return is_target(value) or any(is_target(held) for each in all_holdings([value]) for held in each.values())


def snapshot(values: Iterable[Any]) -> Callable[[], None]:
    """Take note of what is held within these values, at any depth. Calling the result puts it all back in place."""
    return noted(all_holdings(values))


def attributes_noted(holders: Iterable[Any]) -> Callable[[], None]:
    """Take note of which attributes these modules, classes and objects have. Calling the result puts them back."""
    before = [(holder, dict(vars(holder))) for holder in holders]

    def put_back() -> None:
        for holder, attributes in before:
            for name in vars(holder).keys() - attributes.keys():
                type.__delattr__(holder, name) if isinstance(holder, type) else vars(holder).pop(name)
            for name, value in attributes.items():
                if vars(holder).get(name, holder) is not value:
                    setattr(holder, name, value) if isinstance(holder, type) else vars(holder).update({name: value})

    return put_back


def noted(holdings: Iterable[Holding]) -> Callable[[], None]:
    """Take note of what these hold now. Calling the result puts it all back in place."""
    before = [(each, list(each.values()), dict(each.of) if isinstance(each.of, dict) else {}) for each in holdings]

    def put_back() -> None:
        for holding, values, items in before:
            if not same(values, _values_now(holding)):
                _put_back(holding, values, items)

    return put_back


def _values_now(holding: Holding) -> list[Any]:
    """What is held now; nothing where a variable or attribute was deleted meanwhile."""
    try:
        return list(holding.values())
    except (KeyError, AttributeError, ValueError):
        return []


def same(values: list[Any], others: list[Any]) -> bool:
    """Whether two lists have the same objects, where bytes are the same if they are equal."""
    if len(values) != len(others):
        return False
    return all(map(is_, values, others)) or all(
        a is b or (type(a) is bytes and type(b) is bytes and a == b) for a, b in zip(values, others)
    )


def _put_back(holding: Holding, values: list[Any], items: dict[Any, Any]) -> None:
    of = holding.of
    if isinstance(of, MappingProxyType):
        return  # a class's attributes: what a call changed there, it changed for all
    if holding.read is _state:
        next(put for kind, (_, put) in _STATES.items() if isinstance(of, kind))(of, pickle.loads(values[0]))
    now = _values_now(holding) or repeat(holding)
    for name, value, new in zip(holding.names, values, now):
        if value is not new and isinstance(of, dict):
            of[name] = value
        elif value is not new:
            setattr(of, name, value)
    if not holding.names and isinstance(of, (dict, set, list, deque)):
        of.clear()
        of.extend(values) if isinstance(of, (list, deque)) else of.update(items if isinstance(of, dict) else values)


def is_looked_into(value: Any) -> bool:
    """Whether an object's attributes may be settings of a model."""
    return _are_settings(type(value).__module__ or "")


@functools.cache  # by modules' names
def _are_settings(module: str) -> bool:
    if module.startswith(_SETTINGS):
        return True
    return not module.startswith(_MACHINERY) and module.partition(".")[0] not in sys.stdlib_module_names


@functools.cache  # by modules' names
def is_library(module: str) -> bool:
    """Whether a Python module is installed, rather than a part of somebody's own program: its globals stay."""
    if module.startswith(_MACHINERY) or module.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return file.startswith(_STDLIB) or "-packages" in file


def is_empty(cell: CellType) -> bool:
    """Whether a variable that a function closes over has no value yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def own_names(kind: type) -> list[str]:
    """The names of a class's own attributes, without those that Python gives every class."""
    return [name for name in vars(kind) if not name.startswith("__")]


def _state(generator: Any) -> tuple[bytes]:
    read = next(read for kind, (read, _) in _STATES.items() if isinstance(generator, kind))
    return (pickle.dumps(read(generator)),)


def _progress(iterator: Any) -> tuple[bytes]:
    """How far an iterator has come."""
    if isinstance(iterator, GeneratorType):
        frame = iterator.gi_frame
        plain = {name: value for name, value in frame.f_locals.items() if isinstance(value, PLAIN)} if frame else {}
        return (repr((frame and frame.f_lasti, plain)).encode(),)
    return ((repr(iterator) if isinstance(iterator, count) else str(length_hint(iterator))).encode(),)


def _array_like(array: numpy.ndarray[Any, Any], content: bytes) -> numpy.ndarray[Any, Any]:
    return numpy.frombuffer(content, array.dtype).reshape(array.shape)


def _in_this_context(variable: ContextVar[Any]) -> tuple[Any]:
    try:
        return (variable.get(),)
    except LookupError:
        return (None,)


def _by_names(getter: Callable[..., Any], of: Any, names: Iterable[str]) -> Holding:
    names = tuple(names)
    twice = names * 2 if len(names) == 1 else names  # of one name, `getter` would give the value and no tuple
    return Holding(getter(*twice), of, twice)


def _of_attributes(value: Any) -> list[Holding]:
    own = getattr(value, "__dict__", None)  # of a type with arguments, as `tuple[int]`, it is that of the class
    inside = [Holding(dict.values, own)] if isinstance(own, dict) else []
    named = [n for kind in type(value).__mro__ for n in _slots(kind) if not n.startswith("__") and hasattr(value, n)]
    return inside + ([_by_names(attrgetter, value, named)] if named else [])


def _slots(kind: type) -> tuple[str, ...]:
    names = vars(kind).get("__slots__", ())
    return (names,) if isinstance(names, str) else tuple(names)


def _of_function(function: FunctionType) -> Iterator[Holding]:
    for cell in function.__closure__ or ():
        if not is_empty(cell):
            yield _by_names(attrgetter, cell, ["cell_contents"])
    if function.__defaults__ or function.__kwdefaults__:
        yield _by_names(attrgetter, function, ["__defaults__", "__kwdefaults__"])
    if is_library(function.__globals__.get("__name__") or ""):
        return  # its globals stay, and what it keeps by the way is its own affair
    if vars(function):
        yield Holding(dict.values, vars(function))
    named = [name for name in function.__code__.co_names if name in function.__globals__]
    if named:
        yield _by_names(itemgetter, function.__globals__, named)
    for module in {id(m): m for m in map(function.__globals__.get, named) if isinstance(m, ModuleType)}.values():
        inside = [name for name in function.__code__.co_names if name in vars(module)]
        if inside and not is_library(module.__name__):
            yield _by_names(itemgetter, vars(module), inside)
