"""A call, its key (what a captured graph was specialised on), and in what two calls differ."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..torch_private.tensors import is_wrapped

# A leaf of a call: an argument's constant, or what a graph is specialised on in a tensor.
Leaf = tuple[Any, ...]
COUNTER: Leaf = (int, "any")  # an integer that graphs are not specialised on


class Call(NamedTuple):
    """The arguments of a call, and the same taken apart once: its leaves, and their structure."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    structure: Hashable

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Its leaves are a pytree's; its structure is compared and hashed in C, where a pytree's is in Python."""
        leaves: list[Any] = []
        structure = tuple([_take_apart(value, leaves) for value in (*args, *kwargs.values())])
        return cls(args, kwargs, leaves, (len(args), tuple(kwargs), structure))


def _take_apart(value: Any, leaves: list[Any]) -> Hashable:
    """Add a value's leaves, in a pytree's order; returns its structure, which is None where it is a leaf itself."""
    kind = type(value)
    # Named tuples are registered as one, whatever is registered of their class.
    named = issubclass(kind, tuple) and kind is not tuple and pytree.is_namedtuple_instance(value)
    node = pytree.SUPPORTED_NODES.get(namedtuple if named else kind)  # type: ignore[arg-type]
    if node is None:
        leaves.append(value)
        return None
    children, context = node.flatten_fn(value)
    return kind, _hashable(context), tuple([_take_apart(child, leaves) for child in children])


def _hashable(context: Any) -> Hashable:
    if isinstance(context, list):
        context = tuple(context)
    try:
        hash(context)
    except TypeError:
        return _Compared(context)
    return context


@dataclass(frozen=True)
class _Compared:
    """What cannot be hashed, by its equality alone."""

    value: Any

    def __hash__(self) -> int:
        return 0


class CallKey(NamedTuple):
    """All that a graph is specialised on. `layout` and `attributes` number the tree's state (`layout.py`)."""

    part: str
    structure: Hashable
    leaves: tuple[Leaf, ...]
    grad: bool
    inference: bool
    autocast: tuple[torch.dtype | None, ...]
    layout: int
    adapters: tuple[Hashable, ...]
    merged: frozenset[str]
    attributes: int
    full: tuple[str, ...]  # arguments that are masks and mask nothing


def full_masks(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of attention masks that are all ones: a graph for these can do without. One check a mask and call."""
    masks = [(name, mask) for name, mask in kwargs.items() if name.endswith("attention_mask") and _is_plain(mask)]
    return tuple([name for name, mask in masks if bool((mask == 1).all())])


def _is_plain(mask: Any) -> bool:
    """Whether a mask has a number for each token, and whether they can be looked at now."""
    if type(mask) is not Tensor or mask.ndim != 2 or mask.is_floating_point() or mask.is_meta:
        return False
    return not is_wrapped(mask) and not (mask.is_cuda and torch.cuda.is_current_stream_capturing())


def is_counter(leaf: Leaf | Any) -> bool:
    """Whether a leaf's key is that of an integer that a graph need not be specialised on: 0 and 1 often mean more."""
    return len(leaf) == 2 and leaf[0] is int and leaf != COUNTER and leaf[1] > 1


def changed_counters(new: CallKey, old: CallKey) -> frozenset[int]:
    """The numbers of the leaves in which two calls differ, if these are counters and there is no other difference."""
    if new._replace(leaves=()) != old._replace(leaves=()):
        return frozenset()
    pairs = [(number, a, b) for number, (a, b) in enumerate(zip(new.leaves, old.leaves)) if a != b]
    counters = all(is_counter(a) and is_counter(b) for _, a, b in pairs)
    return frozenset(number for number, _, _ in pairs) if counters else frozenset()


def leaf_names(names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """What to call each leaf of a call, as `input_ids`; `names` are those of the positional arguments."""
    paths, _ = pytree.tree_flatten_with_path((dict(zip(names, args)), dict(kwargs)))
    return tuple(".".join(_atom(k) for k in path[1:]) for path, _ in paths)


def _atom(key: Any) -> str:
    return str(next((getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)), key))


def differences(new: CallKey, new_names: tuple[str, ...], old: CallKey, old_names: tuple[str, ...]) -> Iterator[str]:
    """In what a call differs from an earlier one of the same part, a phrase each."""
    now, before = dict(zip(new_names, new.leaves)), dict(zip(old_names, old.leaves))
    for name in [*now, *(name for name in before if name not in now)]:
        if now.get(name) != before.get(name):
            yield f"{name}: {_leaf_text(before.get(name))} → {_leaf_text(now.get(name))}"
    if new.structure != old.structure and now == before:
        yield "the arguments' structure"
    for field in ("grad", "inference", "autocast", "adapters", "merged", "full"):
        if getattr(new, field) != getattr(old, field):
            yield f"{field}: {_text(getattr(old, field))} → {_text(getattr(new, field))}"
    if new.layout != old.layout:
        yield "the model's modes (train or eval), dtypes, devices, hooks or modules"


def _leaf_text(leaf: Leaf | None) -> str:
    if leaf is None:
        return "not given"
    if len(leaf) == 2:
        return repr(leaf[1]) if not isinstance(leaf[1], str) else leaf[1]
    _, dtype, device, requires_grad, sizes = leaf
    shape = ", ".join("n" if size == 2 else str(size) for size in sizes)  # type: ignore[attr-defined]
    gradient = ", requires grad" if requires_grad else ""
    return f"({shape}) {str(dtype).removeprefix('torch.')} on {device}{gradient}"


def _text(value: Any) -> str:
    if isinstance(value, (tuple, frozenset)):
        return ", ".join(sorted(map(_text, value))) or "none"
    return str(value).removeprefix("torch.")
