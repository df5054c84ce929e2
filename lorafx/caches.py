"""Key-value caches as pytrees: torch.export sees the tensors and counters in them, and gives full caches back."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, CacheLayerMixin

_MAPPED = "_lorafx_mapped"
_INNER = (Tensor, torch.SymInt, list, tuple, dict, Cache, CacheLayerMixin)


def register_caches(model: nn.Module) -> None:
    """Let pytrees look into transformers' caches, and into the cache classes that a model's own module defines."""
    own = vars(sys.modules.get(type(model).__module__, object())) if hasattr(model, "config") else {}
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


def _family(cls: type) -> Iterator[type]:
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


def _unflatten(cls: type, children: Iterable[Any], context: Any) -> Any:
    (names, fixed), children = context, list(children)
    cache = object.__new__(cls)
    vars(cache).update(zip(names, children))
    vars(cache).update(fixed)
    if not all(map(_is_inner, children)):  # a tree map put something else in their place
        vars(cache)[_MAPPED] = names
    return cache
