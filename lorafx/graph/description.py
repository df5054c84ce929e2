"""Descriptions: hashable stand-ins for values, equal where whoever asks need not tell the values apart.

What is kept by a key (a graph by the call it was captured from, a layer by what it computes) puts one of these into the
key for each value. How much of a value counts depends on who asks:

| function | describes | what counts |
|---|---|---|
| `attribute_key` | a Python value that a module or config holds, which a graph has as a constant | all of it |
| `argument_key` | an argument of a call | a constant's value; a tensor's dtype, device, and sizes of 0 and 1 |
| `parameter_key` | a tensor of the tree | dtype and device |
| `operand_key` | an argument of a torch function, while layers that repeat are compared | all that torch sees of it |
| `traced_tensor_key` | a tensor of a capture, before anything reads its values | shape and strides, as expressions |
| `node_value_key` | the value of a node, while blocks are compared | shapes and numbers, as expressions |
| `interface_key` | the value of a node, while it is verified | shapes as expressions; of a number, its type |
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from ..torch_private.tensors import DisableTorchFunction
from ..torch_private.tracing import FakeTensor

# What every module has, and torch or lorafx look after: parameters, buffers, modules, hooks.
MODULES_OWN = frozenset(vars(nn.Module())) - {"training"} | {"_lorafx", "_lorafx_attached"}
PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
DEPTH, LARGE = 4, 4096  # of containers within containers; of one whose items are not looked at

# What a torch function is given besides tensors: values that compare by what they are, whose class is exactly one of
# these, and objects that never change, of one of these classes.
_CONSTANTS: set[type] = {
    *(type(None), type(...), int, float, bool, complex, str),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
}
_IMMUTABLE = (
    *(FunctionType, BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType),
    *(OpOverload, OpOverloadPacket, HigherOrderOperator, type),
)

# --- values that a module tree and its calls bring along -------------------------------------------------------------


def attribute_key(value: Any, depth: int = DEPTH) -> Hashable:
    """Equal for equal plain values and containers of them, and for one and the same other object.

    A tensor counts by what a graph is specialised on; its values are read when the graph runs.
    """
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        return Tensor, value.dtype, value.device, value.shape
    if isinstance(value, (list, tuple, dict, set, frozenset)) and len(value) > LARGE:
        return type(value), len(value), id(value)  # a vocabulary, say, and no setting
    if isinstance(value, (list, tuple)) and depth:
        return type(value), *(attribute_key(item, depth - 1) for item in value)
    if isinstance(value, dict) and depth:
        return type(value), *((attribute_key(key), attribute_key(item, depth - 1)) for key, item in value.items())
    if isinstance(value, weakref.ref):  # it owns nothing, as those in which an LSTM remembers its weights
        return (weakref.ref,)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(attribute_key(item, depth - 1) for item in value)
    return type(value), id(value)


def argument_key(value: Any, sizes: tuple[int, ...] = ()) -> tuple[Any, ...]:
    """Equal for tensors of one dtype and device, and need of gradients, that have sizes of 0 and 1 at the same places.

    Anything else counts by itself: the pair of its type and the value. `sizes` are a tensor's last sizes, where a graph
    is specialised on them.
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
    """Equal for tensors that may stand in each other's place in a tree, as adapters of one shape do."""
    return tensor.dtype, tensor.device


# --- values in a capture ---------------------------------------------------------------------------------------------


def operand_key(value: Any, tensor_key: Callable[[Tensor], Hashable], keep: list[Any]) -> Hashable:
    """Equal for arguments between which a torch function makes no difference; `tensor_key` answers so for tensors.

    What is described by its identity is put into `keep`: for as long as that lives, no other object can be the same.
    What may change from one call to the next is equal to nothing.
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
    """Equal for fake tensors between which torch makes no difference; a tensor of another sort is equal to nothing."""
    with DisableTorchFunction():
        if tensor.layout is not torch.strided or type(tensor) not in (FakeTensor, nn.Parameter, nn.Buffer):
            return object()
        sizes = (*tensor.shape, *tensor.stride())
        exact = tuple([size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes])
        return exact, tensor.ndim, tensor.dtype, tensor.device, tensor.requires_grad, type(tensor)


# --- values of a graph's nodes ---------------------------------------------------------------------------------------


def node_value_key(value: Any) -> Any:
    """Equal for values of equal shapes (expressions of sizes), dtypes and devices, and for equal numbers."""
    return _by_tensor(value, str)


def interface_key(value: Any) -> Any:
    """Equal for values of equal shapes, dtypes and devices; any number of a type is equal to any other.

    A size is an `int`, for torch may settle a symbolic one on the way.
    """
    return _by_tensor(value, lambda number: "int" if isinstance(number, torch.SymInt) else type(number).__name__)


def _by_tensor(value: Any, other_key: Callable[[Any], str]) -> Any:
    if isinstance(value, Tensor):
        return tuple(map(str, value.shape)), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(_by_tensor(item, other_key) for item in value)
    return other_key(value)
