"""Key-value caches as pytrees: torch.export sees the tensors and counters in them, and gives full caches back."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

_MAPPED = "_lorafx_mapped"
_plain_update = DynamicSlidingWindowLayer.update
_INNER = (Tensor, torch.SymInt, list, tuple, dict, Cache, CacheLayerMixin)


def register_caches(model: nn.Module) -> None:
    """Let pytrees look into transformers' caches, and into the cache classes that a model's own module defines."""
    own = getattr(sys.modules.get(type(model).__module__), "__dict__", {}) if hasattr(model, "config") else {}
    named = [cls for name, cls in list(own.items()) if inspect.isclass(cls) and name.endswith("Cache")]
    for cls in (*_family(Cache), *_family(CacheLayerMixin), *named):
        if cls not in pytree.SUPPORTED_NODES:
            pytree.register_pytree_node(
                cls,
                _flatten,
                lambda children, context, cls=cls: _unflatten(cls, children, context),  # type: ignore[misc]
                serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
                flatten_with_keys_fn=_flatten_with_keys,
            )


def is_cache(value: Any) -> bool:
    """Whether pytrees look into an object as into a cache: at its attributes, whose names are in its structure."""
    node = pytree.SUPPORTED_NODES.get(type(value))
    return node is not None and node.flatten_fn is _flatten


def is_length(name: str) -> bool:
    """Whether a leaf of a call, by its name, is how many tokens a layer of a cache has seen."""
    return name.rpartition(".")[2].startswith("cumulative_length")


def _family(cls: Any) -> Iterator[Any]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _family(sub)


def _is_inner(value: Any) -> bool:
    return isinstance(value, _INNER) or type(value) is int


def _flatten(cache: Any) -> tuple[list[Any], Any]:
    """Tensors, counters and what holds them are children; flags, names and the like belong to the structure."""
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
    """Let a sliding window that is filling up, just full and overflowing be one graph, by sizes instead of branches."""
    own = {name: vars(DynamicSlidingWindowLayer)[name] for name in ("update", "get_mask_sizes")}
    DynamicSlidingWindowLayer.update, DynamicSlidingWindowLayer.get_mask_sizes = _update, _mask_sizes  # type: ignore
    try:
        yield
    finally:
        for name, method in own.items():
            setattr(DynamicSlidingWindowLayer, name, method)


def _update(self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """All keys and values that these tokens may look at; the layer keeps the last of them, one less than its window."""
    if getattr(self, "record_past", False):
        return _plain_update(self, key_states, value_states, *args, **kwargs)
    if not self.is_initialized:
        self.lazy_initialization(key_states, value_states)
    self.cumulative_length += key_states.shape[-2]
    keys, values = torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)
    first = torch.sym_max(keys.shape[-2] - self.sliding_window + 1, 0)
    self.keys, self.values = keys[:, :, first:], values[:, :, first:]
    return keys, values


def _mask_sizes(self: Any, query_length: int) -> tuple[int, int]:
    """How many keys these tokens may look at, and the position of the first."""
    seen, kept = self.cumulative_length, self.sliding_window - 1
    return torch.sym_min(seen, kept) + query_length, torch.sym_max(seen - kept, 0)
