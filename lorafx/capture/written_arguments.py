"""Arguments that a call writes to: a cache that the caller passes is filled, as the model itself would fill it.

A graph only computes. So while one is captured, the model gets its arguments in new containers (lists, dicts, caches),
and those that it has changed become a second output of the graph. After each run of the graph, `fill` puts what is in
these into the caller's own containers; where the model returns an argument, the caller gets back the one he passed.
"""

from __future__ import annotations

from collections import UserDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, repeat
from operator import is_
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .caches import is_cache

_GIVEN = "lorafx: the argument "  # and its name: in an output, stands for an argument that is returned
_PLAIN = (bool, int, float, str, bytes, type(None))


def rebuilt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments in containers of their own."""
    return pytree.tree_map(lambda leaf: leaf, (args, kwargs))


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are containers, by name; positional ones by their place, as "0"."""
    named = {**{str(number): value for number, value in enumerate(args)}, **kwargs}
    return {name: value for name, value in named.items() if not pytree.tree_is_leaf(value)}


def contents(containers: Mapping[str, Any]) -> dict[str, tuple[list[Any], pytree.TreeSpec]]:
    """What is in each container now."""
    return {name: pytree.tree_flatten(value) for name, value in containers.items()}


def changed(containers: Mapping[str, Any], before: Mapping[str, tuple[list[Any], pytree.TreeSpec]]) -> dict[str, Any]:
    """The containers that hold something else than before. A tensor that was written to in place is the same one."""
    now = contents(containers)
    return {name: containers[name] for name in containers if not _same(*now[name], *before[name])}


def _same(leaves: list[Any], spec: pytree.TreeSpec, old_leaves: list[Any], old_spec: pytree.TreeSpec) -> bool:
    return len(leaves) == len(old_leaves) and spec == old_spec and all(map(_is_same, leaves, old_leaves))


def _is_same(leaf: Any, old: Any) -> bool:
    return leaf is old or (type(leaf) in _PLAIN and type(leaf) is type(old) and leaf == old)


def without_given(output: Any, containers: Mapping[str, Any]) -> Any:
    """A model's output with a text in the place of each argument that it returns; `fill` reads it."""
    names = {id(value): _GIVEN + name for name, value in containers.items()}
    if not _holds(output, names):
        return output
    return pytree.tree_map(lambda leaf: names.get(id(leaf), leaf), output, is_leaf=lambda value: id(value) in names)


def _holds(output: Any, ids: Mapping[int, str]) -> bool:
    return any(id(value) in ids for value in pytree.tree_leaves(output, is_leaf=lambda value: id(value) in ids))


def fill(leaves: Sequence[Any], spec: pytree.TreeSpec, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Put what a graph has filled into the caller's arguments, and return the model's output.

    `leaves` and `spec` are what the graph gives, flat: its output, and the filled containers by name. `args` and
    `kwargs` are the call's own.
    """
    own = given(args, kwargs)
    marks = {_GIVEN + name: value for name, value in own.items()}
    rest = iter([marks.get(leaf, leaf) if type(leaf) is str else leaf for leaf in leaves])
    output, filled = spec.children()
    result = _made(output, rest)
    for name, container in zip(filled.context, filled.children()):
        _pour_leaves(own[name], container, rest)
    return result


def _made(spec: pytree.TreeSpec, leaves: Iterator[Any]) -> Any:
    return spec.unflatten(list(islice(leaves, spec.num_leaves)))


def _pour_leaves(old: Any, spec: pytree.TreeSpec, leaves: Iterator[Any]) -> Any:
    """`pour(old, new)` for what `spec` makes of the next leaves. Lists and caches are filled without making `new`."""
    if spec.is_leaf():
        return next(leaves)
    if type(old) is not spec.type or not (type(old) is list or is_cache(old)):
        return pour(old, _made(spec, leaves))
    if isinstance(old, list):
        old[:] = [_pour_leaves(item, child, leaves) for item, child in zip(chain(old, repeat(None)), spec.children())]
        return old
    (names, fixed), attributes = spec.context, vars(old)
    new = {name: _pour_leaves(attributes.get(name), child, leaves) for name, child in zip(names, spec.children())}
    new.update(fixed)
    for name in attributes.keys() - new.keys():
        del attributes[name]
    attributes.update(new)
    return old


def pour(old: Any, new: Any) -> Any:
    """Give the container `old` the contents of `new` and return `old`; return `new` where that cannot be done."""
    if type(old) is not type(new) or isinstance(old, (Tensor, *_PLAIN)):
        return new
    if isinstance(old, tuple):  # a `torch.Size` is one value
        return new if pytree.tree_is_leaf(old) else _poured_tuple(old, new)
    if isinstance(old, (list, deque)):
        items = list(map(pour, old, new)) + list(new)[len(old) :]
        old.clear()
        old.extend(items)
    elif isinstance(old, dict):
        _pour_items(old, old.items(), new.items())
    elif isinstance(old, UserDict):  # a batch, of which `new` has the dict, and attributes that are plain
        pour(old.data, new.data)
        vars(old).update({name: value for name, value in vars(new).items() if name != "data"})
    elif type(old) in pytree.SUPPORTED_NODES and hasattr(old, "__dict__"):
        _pour_items(vars(old), vars(old).items(), vars(new).items())
    else:
        return new
    return old


def _poured_tuple(old: Any, new: Any) -> Any:
    """Fill what a tuple holds, for it cannot be filled itself: `old` if nothing else was new, or else a new tuple."""
    items = list(map(pour, old, new)) + list(new)[len(old) :]
    if len(items) == len(old) and all(map(is_, items, old)):
        return old
    return pytree.tree_structure(new, is_leaf=lambda value: value is not new).unflatten(items)


def _pour_items(into: Any, old: Iterable[tuple[Any, Any]], new: Iterable[tuple[Any, Any]]) -> None:
    before, after = dict(old), dict(new)
    for name in before.keys() - after.keys():
        del into[name]
    for name, value in after.items():
        into[name] = pour(before[name], value) if name in before else value
