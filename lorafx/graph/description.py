"""Descriptions: hashable keys of values. Two values have equal keys if one may stand in the other's place.

A graph is kept by the call that it was captured from, a layer by what it computes; their keys are made of these. What
counts depends on the use:

| function | describes | what counts |
|---|---|---|
| `attribute_key` | a Python value of a module, which a graph holds as a constant | all of it |
| `held_key` | a Python value of anything else that a module holds | all of it |
| `argument_key` | an argument of a call | a constant's value; a tensor's dtype, device, gradient and sizes of 0, 1 |
| `parameter_key` | a tensor of the tree | dtype and device |
| `operand_key` | an argument of a torch function, while layers that repeat are compared | all that torch sees of it |
| `traced_tensor_key` | a tensor of a capture, without its values | shape and strides as expressions, dtype, device |
| `node_value_key` | the value of a node, while blocks are compared | shapes and numbers, as expressions |
| `interface_key` | the value of a node, while it is verified | shapes as expressions; of a number, its type |
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Hashable
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils.hooks import RemovableHandle

from ..torch_private.tensors import DisableTorchFunction
from ..torch_private.tracing import FakeTensor
from ..tree.holdings import CONTAINERS, PLAIN, holdings

# Arguments of torch functions besides tensors: constants, which are compared by value and are of exactly one of these
# classes, and objects that never change, which are compared by identity.
_CONSTANTS: set[type] = {
    *(type(None), type(...), int, float, bool, complex, str),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
}
_IMMUTABLE = (
    *(FunctionType, BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType),
    *(OpOverload, OpOverloadPacket, HigherOrderOperator, type),
)
_PLAIN = frozenset(PLAIN)

# --- values that a module tree and its calls bring along -------------------------------------------------------------


def attribute_key(value: Any, keep: list[Any], apart: Container[int] = ()) -> Hashable:
    """The key of a module's attribute: as `held_key`, but a tensor counts by dtype, device and shape.

    A graph reads it where the module has it, when it runs.
    """
    if isinstance(value, Tensor):
        return Tensor, value.dtype, value.device, value.shape
    return held_key(value, keep, apart)


def held_key(value: Any, keep: list[Any], apart: Container[int] = ()) -> Hashable:
    """A key by value for plain values, containers and partials, by identity for all else; and by all held within.

    A tensor counts by identity, too: it is a constant of a graph. What counts so is put into `keep`, which has to live
    as long as the key, so that no later object gets the same `id`. What an object holds whose `id` is in `apart` is
    described apart, and not here.
    """
    if type(value) in _PLAIN:  # as nearly all are
        return (_of_plain(value),)
    tokens: list[Hashable] = []
    seen: dict[int, int] = {}
    pending = [value]
    while pending:
        token, held = _describe(pending.pop(), keep, apart, seen)
        tokens.append((*token, len(held)))
        pending += reversed(held)
    return tuple(tokens)


def _of_plain(value: Any) -> tuple[Any, ...]:
    return type(value), repr(value) if isinstance(value, float) else value


def _describe(
    value: Any, keep: list[Any], apart: Container[int], seen: dict[int, int]
) -> tuple[tuple[Any, ...], list[Any]]:
    """What to say of a value itself, and the values that it holds, to be described as well."""
    if id(value) in apart:  # asked first: each question for the class of one of transformers' configs runs its Python
        keep.append(value)
        return (type(value), id(value)), []
    if isinstance(value, PLAIN):
        return _of_plain(value), []
    if isinstance(value, (weakref.ref, RemovableHandle)):  # no settings: an LSTM, for one, refers to its weights so
        return (type(value),), []
    if id(value) in seen:
        return ("again", seen[id(value)]), []
    seen[id(value)] = len(seen)
    keep.append(value)
    if isinstance(value, Tensor):
        return (Tensor, id(value), value.dtype, value.device, value.shape), []
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset((type(item), item) for item in value)), []
    inside = holdings(value)
    by_content = isinstance(value, partial) or (isinstance(value, CONTAINERS) and (inside or not value))
    held = [item for holding in inside for item in holding.values()]
    return (type(value), None if by_content else id(value)), held


def argument_key(value: Any, sizes: tuple[int, ...] = ()) -> tuple[Any, ...]:
    """A tensor's class, dtype, device, `requires_grad` and sizes, where all sizes above 1 count as 2.

    `sizes` are the tensor's last sizes, if a graph is specialised on them: these count as they are. The key of any
    other value is its type and the value, or its `repr` if it has no hash.
    """
    if isinstance(value, Tensor):
        shape = value.shape[: -len(sizes)] if sizes else value.shape
        coarse = (*[2 if size > 1 else size for size in shape], *sizes)
        return type(value), value.dtype, value.device, value.requires_grad, coarse
    try:
        hash(value)
    except TypeError:
        return type(value), repr(value)
    return type(value), value


def parameter_key(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    """Dtype and device: a tensor of equal ones may replace another in the tree, as adapters of one shape do."""
    return tensor.dtype, tensor.device


# --- values in a capture ---------------------------------------------------------------------------------------------


def operand_key(value: Any, tensor_key: Callable[[Tensor], Hashable], keep: list[Any]) -> Hashable:
    """A key by which a torch function, given either of two arguments with equal keys, does the same.

    `tensor_key` gives the key of a tensor. Objects that never change are compared by identity and put into `keep`,
    which has to live as long as the key, so that no later object gets the same `id`. The key of an object that may
    change equals no other key.
    """
    if isinstance(value, Tensor):
        return tensor_key(value)
    kind = type(value)
    if kind in _CONSTANTS:
        return kind, repr(value) if kind is float else value
    if kind in (torch.SymInt, torch.SymFloat, torch.SymBool):
        return kind, value.node.expr
    if isinstance(value, (tuple, list)):
        return kind, tuple([operand_key(item, tensor_key, keep) for item in value])
    if kind is dict:
        return kind, tuple([(key, operand_key(item, tensor_key, keep)) for key, item in value.items()])
    if kind is slice:
        return kind, operand_key((value.start, value.stop, value.step), tensor_key, keep)
    if isinstance(value, MethodWrapperType):
        return kind, value
    if not isinstance(value, _IMMUTABLE):
        return object()
    keep.append(value)
    return kind, id(value)


def traced_tensor_key(tensor: Tensor) -> Hashable:
    """What torch knows of a fake tensor: sizes and strides as expressions, dtype, device, `requires_grad`, class.

    The key of any other tensor (sparse, a subclass) equals no other key.
    """
    with DisableTorchFunction():
        if tensor.layout is not torch.strided or type(tensor) not in (FakeTensor, nn.Parameter, nn.Buffer):
            return object()
        sizes = (*tensor.shape, *tensor.stride())
        exact = tuple([size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes])
        return exact, tensor.ndim, tensor.dtype, tensor.device, tensor.requires_grad, type(tensor)


# --- values of a graph's nodes ---------------------------------------------------------------------------------------


def node_value_key(value: Any) -> Any:
    """A tensor's shape (as expressions), dtype and device; a number itself."""
    return _by_tensor(value, str)


def interface_key(value: Any) -> Any:
    """A tensor's shape (as expressions), dtype and device; of a number the name of its type alone.

    A symbolic size counts as an `int`, because torch may turn it into one on the way.
    """
    return _by_tensor(value, lambda number: "int" if isinstance(number, torch.SymInt) else type(number).__name__)


def _by_tensor(value: Any, other_key: Callable[[Any], str]) -> Any:
    if isinstance(value, Tensor):
        return tuple(map(str, value.shape)), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(_by_tensor(item, other_key) for item in value)
    return other_key(value)
