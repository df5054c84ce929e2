"""A call, in the one form in which equal calls are equal, and its key: what a graph of it is specialised on."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections import UserDict, namedtuple
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..adapters.adapter import ANY_SCALE, Adapter
from ..capture.arguments import images
from ..capture.batches import register_batch
from ..graph.description import argument_key, parameter_key
from ..ops.modes import Defaults, is_recorded, modes
from ..pipeline import Context
from ..torch_private.tensors import is_wrapped
from ..tree.lookup import find_tensor, module_at
from .attribute_guards import AttributeState
from .tree_state import TreeState

Leaf = tuple[Any, ...]  # an argument as `argument_key` describes it, or FREE_COUNTER
FREE_COUNTER: Leaf = (int, "any")  # an integer that graphs are not specialised on


class Call(NamedTuple):
    """A call of the module at `path` below `tree`, with the adapters of `context`.

    The arguments are there as they are given to the module; by name, as far as its forward has names for them; and
    taken apart into `leaves` (tensors and constants, in a pytree's order) and their `structure`, which are the same
    however they are given.
    """

    tree: nn.Module
    context: Context
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: dict[str, Any]
    leaves: list[Any]
    structure: Hashable

    @classmethod
    def of(cls, tree: nn.Module, context: Context, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call in its one form."""
        module = type(module_at(tree, path))
        kwargs = in_one_order(module, kwargs)
        names = positional_names(module)  # type: ignore[arg-type]
        if len(args) > len(names):  # some go to the forward's `*args`
            return cls(tree, context, path, args, kwargs, kwargs, *taken_apart(args, kwargs))
        named = dict(zip(names, args)) | kwargs if args else kwargs
        return cls(tree, context, path, args, kwargs, named, *taken_apart((), named))

    def given(self, positional: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with so many of them by position, as another call of this kind may have been given them."""
        if positional == len(self.args):
            return self.args, self.kwargs
        values, items = tuple(self.named.values()), list(self.named.items())
        return values[:positional], dict(items[positional:])


def in_one_order(module: type[nn.Module], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments in the order of a forward's parameters, without those that say None where that is the default.

    Those that the forward does not name come last, in the order that they are given in.
    """
    named = _named_parameters(module)  # type: ignore[arg-type]
    given = {name: kwargs[name] for name in named if name in kwargs}
    rest = {name: value for name, value in kwargs.items() if name not in named}
    return {name: value for name, value in given.items() if value is not None or named[name] is not None} | rest


@functools.cache  # of classes, whose forwards stay as they are
def _named_parameters(module: type[nn.Module]) -> dict[str, Any]:
    """The parameters of a forward that can be given by name, and their defaults."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


@functools.cache
def positional_names(module: type[nn.Module]) -> tuple[str, ...]:
    """The names of a forward's arguments that can be given either way, as far as none before them cannot."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    return tuple(p.name for p in itertools.takewhile(lambda p: p.kind is p.POSITIONAL_OR_KEYWORD, parameters))


def taken_apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Hashable]:
    """The leaves of arguments, as a pytree has them, and their structure.

    A pytree's own structure says as much, but it is compared and hashed in Python, and this one in C.
    """
    leaves: list[Any] = []
    structure = tuple([_take_apart(value, leaves) for value in (*args, *kwargs.values())])
    return leaves, (len(args), tuple(kwargs), structure)


def _take_apart(value: Any, leaves: list[Any]) -> Hashable:
    """Add a value's leaves to `leaves`; the result is the value's structure, None for a leaf."""
    kind = type(value)
    # A named tuple is treated as one, whatever is registered for its class: pytrees do so.
    named = issubclass(kind, tuple) and kind is not tuple and pytree.is_namedtuple_instance(value)
    node = pytree.SUPPORTED_NODES.get(namedtuple if named else kind)  # type: ignore[arg-type]
    if node is None and issubclass(kind, UserDict):
        node = register_batch(kind)
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
        return _Unhashed(context)
    return context


@dataclass(frozen=True)
class _Unhashed:
    """Something that has no hash: it is compared, and all of its kind share one hash."""

    value: Any

    def __hash__(self) -> int:
        return 0


class CallKey(NamedTuple):
    """All that a graph is specialised on. Calls of equal keys share programs."""

    part: str  # the path of the module that is called
    structure: Hashable
    leaves: tuple[Leaf, ...]
    grad: bool
    inference: bool
    autocast: tuple[torch.dtype | None, ...]
    defaults: Defaults
    layout: int
    adapters: tuple[tuple[str, Hashable], ...]
    merged: frozenset[str]
    attributes: AttributeState | None  # None: whatever they are, for the model's own Python reads them
    full: tuple[str, ...]  # arguments that are masks and mask nothing

    @classmethod
    def of(cls, call: Call, state: TreeState) -> CallKey:
        """The key of a call that finds the tree in a state."""
        sizes = {id(image): tuple(image.shape[-2:]) for image in images(call.args, call.kwargs)}
        leaves = tuple([_leaf_key(leaf, sizes.get(id(leaf), ())) for leaf in call.leaves])
        adapters, merged, masks = _adapters(call), call.context.merged, full_masks(call.named)
        return cls(
            *(call.path, call.structure, leaves, *modes()),
            *(state.layout, adapters, merged, state.attributes, masks),
        )

    def has(self, adapter: str) -> bool:
        """Whether an adapter of this name acts, of any scale or not."""
        return any(is_of(adapter, each) for each, _ in self.adapters)

    def with_any_names(self) -> CallKey:
        """The key of such calls with adapters of any names."""
        return self._replace(adapters=tuple([("", values) for _, values in self.adapters]))

    def with_any_attributes(self) -> CallKey:
        """The key of such calls whatever the attributes of the tree are."""
        return self._replace(attributes=None)


class OperatorKey(NamedTuple):
    """What the graph of an operator is specialised on: the module that calls it, and how, and the adapters' keys."""

    part: str
    call: Hashable
    layout: int
    acting: tuple[str, ...]
    merged: frozenset[str]
    hooked: tuple[str, ...]


def is_of(adapter: str, call_key: str) -> bool:
    """Whether this is what an adapter of this name says of itself for a key, with a scaling that is a tensor or not."""
    return call_key in (adapter, adapter + ANY_SCALE)


def _leaf_key(leaf: Any, sizes: tuple[int, ...]) -> Leaf:
    """As `argument_key`, but of an array, a set or an object that equals only itself the class alone.

    torch.export takes no such argument, so no graph depends on it; nor are its tensors kept for the sake of a key.
    """
    kind = type(leaf)
    by_identity = kind.__hash__ is object.__hash__ and hasattr(leaf, "__dict__")
    if (by_identity or kind.__hash__ is None) and not isinstance(leaf, (Tensor, nn.Module, type, FunctionType)):
        return kind, f"any {kind.__name__}"
    return argument_key(leaf, sizes)


def _adapters(call: Call) -> tuple[tuple[str, Hashable], ...]:
    """The acting adapters by name, dtype and device; of one whose tensors are gone, the name alone."""
    first = [(adapter.call_key, _first_tensor(call.tree, adapter)) for adapter in call.context.adapters]
    return tuple([(key, None if tensor is None else parameter_key(tensor)) for key, tensor in first])


def _first_tensor(tree: nn.Module, adapter: Adapter) -> Tensor | None:
    path = next(adapter.paths, None)
    return None if path is None else find_tensor(tree, path)


def full_masks(named: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of attention masks that are all ones: a graph for these can do without. One check a mask and call."""
    masks = [(name, mask) for name, mask in named.items() if name.endswith("attention_mask") and _is_readable(mask)]
    return tuple([name for name, mask in masks if bool((mask == 1).all())])


def _is_readable(mask: Any) -> bool:
    """Whether a mask has a number for each token, and whether they can be looked at now."""
    if type(mask) is not Tensor or mask.ndim != 2 or mask.is_floating_point() or mask.is_meta:
        return False
    return not is_wrapped(mask) and not is_recorded()
