"""Caches as pytrees: torch.export sees the tensors and counters in them, and gives back whole caches."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, LinearAttentionCacheLayerMixin

from ..torch_private.replacing import plain_update, sliding_windows_replaced
from ..torch_private.tracing import Number

_MAPPED = "_lorafx_mapped"  # on a cache: the names of children that a tree map has made something else of
_ROOTS = (Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin, DummyLayer)  # of all classes of caches and layers
# What a graph computes with, or looks into; integers count too, and no booleans.
_INNER = (Tensor, torch.SymInt, list, tuple, dict, *_ROOTS)


def register_caches(model: nn.Module) -> None:
    """Let pytrees look into transformers' caches, and into the cache classes that a model's own module defines."""
    own = getattr(sys.modules.get(type(model).__module__), "__dict__", {}) if hasattr(model, "config") else {}
    named = [cls for name, cls in list(own.items()) if inspect.isclass(cls) and name.endswith("Cache")]
    for cls in (*chain.from_iterable(map(_family, _ROOTS)), *named):
        if cls not in pytree.SUPPORTED_NODES:
            pytree.register_pytree_node(
                cls,
                _flatten,
                lambda children, context, cls=cls: _unflatten(cls, children, context),  # type: ignore[misc]
                serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
                flatten_with_keys_fn=_flatten_with_keys,
            )


def is_cache(value: Any) -> bool:
    """Whether an object is of a class that `register_caches` has registered: its children are attributes, by name."""
    node = pytree.SUPPORTED_NODES.get(type(value))
    return node is not None and node.flatten_fn is _flatten


def is_length(name: str) -> bool:
    """Whether an argument of this dotted name is the number of tokens that a layer of a cache has seen."""
    return name.rpartition(".")[2].startswith("cumulative_length")


def parts(arguments: Mapping[str, Any]) -> dict[Number, Hashable]:
    """The part that each number plays in caches among a call's arguments: their sizes, strides and counters.

    Layers of one class, in one list, are alike: what is called the same in them plays one part, if it is equal in all.
    """
    numbers: dict[Hashable, dict[Number, int | torch.SymInt]] = {}
    for name, value in arguments.items():
        for place, leaf, part in _leaves(value, f"L[{name!r}]", (name,), False):
            for method, index, number in _numbers(leaf):
                numbers.setdefault((part, method, index), {})[place, method, index] = number
    return {place: part for part, found in numbers.items() if len(set(found.values())) == 1 for place in found}


def _leaves(value: Any, place: str, part: tuple[Any, ...], inside: bool) -> Iterator[tuple[str, Any, Hashable]]:
    """The tensors and integers in the caches of an argument, each with its place, as torch names it, and its part."""
    inside = inside or is_cache(value)
    items = enumerate(value) if isinstance(value, (list, tuple)) else value.items() if isinstance(value, dict) else ()
    for key, item in vars(value).items() if is_cache(value) else items:
        role = type(item) if inside and isinstance(key, int) else key
        yield from _leaves(item, f"{place}[{key!r}]", (*part, role), inside)
    if inside and (isinstance(value, Tensor) or type(value) is int):
        yield place, value, part


def _numbers(leaf: Tensor | int) -> Iterator[tuple[str, int | None, int | torch.SymInt]]:
    """The numbers that torch may take for symbols: of a tensor each with the method and the place to ask for it."""
    if isinstance(leaf, int):
        yield "", None, leaf
        return
    for index, (size, stride) in enumerate(zip(leaf.shape, leaf.stride())):
        yield "size", index, size
        yield "stride", index, stride
    yield "storage_offset", None, leaf.storage_offset()


def _family(cls: Any) -> Iterator[Any]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _family(sub)


def _is_inner(value: Any) -> bool:
    return isinstance(value, _INNER) or type(value) is int


def _flatten(cache: Any) -> tuple[list[Any], Any]:
    """Tensors, counters and what holds such are children. Flags, names and the like are part of the structure."""
    inner, fixed = {}, []
    mapped = vars(cache).get(_MAPPED, ())
    for name, value in vars(cache).items():
        if name in mapped or (_is_inner(value) and name != _MAPPED):
            inner[name] = value
        elif name != _MAPPED:
            fixed.append((name, value))
    return list(inner.values()), (tuple(inner), tuple(fixed))


def _flatten_with_keys(cache: Any) -> tuple[list[tuple[pytree.KeyEntry, Any]], Any]:
    children, context = _flatten(cache)
    # As mapping keys: torch's guards replace names by text, and one attribute's name may begin another's.
    return [(pytree.MappingKey(name), child) for name, child in zip(context[0], children)], context


def _unflatten(cls: Any, children: Iterable[Any], context: Any) -> Any:
    (names, fixed), children = context, list(children)
    cache: Any = object.__new__(cls)
    vars(cache).update(zip(names, children))
    vars(cache).update(fixed)
    if not all(map(_is_inner, children)):  # a tree map put something else in their place
        vars(cache)[_MAPPED] = names
    return cache


@contextlib.contextmanager
def branchless_windows() -> Iterator[None]:
    """Let one graph serve sliding windows that are filling up, full and overflowing: with sizes where code branches."""
    with sliding_windows_replaced(_update, _mask_sizes):
        yield


def _update(self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """All keys and values that these tokens may attend to. The layer keeps the last, one fewer than its window."""
    if getattr(self, "record_past", False):
        return plain_update(self, key_states, value_states, *args, **kwargs)
    if not self.is_initialized:
        self.lazy_initialization(key_states, value_states)
    self.cumulative_length += key_states.shape[-2]
    keys, values = torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)
    first = torch.sym_max(keys.shape[-2] - self.sliding_window + 1, 0)
    self.keys, self.values = keys[:, :, first:], values[:, :, first:]
    return keys, values


def _mask_sizes(self: Any, query_length: int) -> tuple[int, int]:
    """How many keys these tokens may attend to, and the position of the first."""
    seen, kept = self.cumulative_length, self.sliding_window - 1
    return torch.sym_min(seen, kept) + query_length, torch.sym_max(seen - kept, 0)
