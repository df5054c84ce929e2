"""Batches as pytrees: what tokenizers and processors of transformers give is a dict within an object.

Calls are told apart by the tensors in it, and torch.export sees these. What an object has besides its dict, as the
encodings of a fast tokenizer, differs from batch to batch: a graph is captured without, so that a model which reads it
is served by its own Python.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable
from typing import Any

from torch.utils import _pytree as pytree

_Context = tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]  # the dict's keys, and attributes that are plain
_PLAIN = (bool, int, float, str, type(None))


def register_batch(kind: type[UserDict[Any, Any]]) -> pytree.NodeDef:
    """Let pytrees look into objects of this class."""
    if kind not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            kind,
            _flatten,
            lambda children, context: _unflatten(kind, children, context),
            serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
            flatten_with_keys_fn=_flatten_with_keys,
        )
    return pytree.SUPPORTED_NODES[kind]


def _flatten(batch: UserDict[Any, Any]) -> tuple[list[Any], _Context]:
    plain = tuple([(name, value) for name, value in vars(batch).items() if isinstance(value, _PLAIN)])
    return list(batch.data.values()), (tuple(batch.data), plain)


def _flatten_with_keys(batch: UserDict[Any, Any]) -> tuple[list[tuple[pytree.KeyEntry, Any]], _Context]:
    children, context = _flatten(batch)
    return [(pytree.MappingKey(key), child) for key, child in zip(context[0], children)], context


def _unflatten(kind: type[UserDict[Any, Any]], children: Iterable[Any], context: _Context) -> UserDict[Any, Any]:
    batch = object.__new__(kind)
    vars(batch).update(context[1], data=dict(zip(context[0], children)))
    return batch
