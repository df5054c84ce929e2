"""What torch was asked and what it answered, as far as it makes a difference to torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch

_PLAIN = {
    type(None),
    type(...),
    int,
    float,
    bool,
    complex,
    str,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
}
_FIXED = (
    FunctionType,
    BuiltinFunctionType,
    MethodDescriptorType,
    WrapperDescriptorType,
    OpOverload,
    OpOverloadPacket,
    HigherOrderOperator,
    type,
)


def described(value: Any, name: Callable[[Tensor], Hashable], keep: list[Any]) -> Hashable:
    """Equal for arguments between which torch makes no difference, where `name` is so for tensors.

    What is described by its identity is put into `keep`: for as long as that lives, no other object can be the same.
    """
    if isinstance(value, Tensor):
        return name(value)
    kind = type(value)
    if kind in _PLAIN:
        return kind, repr(value) if kind is float else value
    if kind in (torch.SymInt, torch.SymFloat, torch.SymBool):
        return kind, value.node.expr
    if isinstance(value, (tuple, list)):
        return kind, tuple([described(item, name, keep) for item in value])
    if kind is dict:
        return kind, tuple([(key, described(item, name, keep)) for key, item in value.items()])
    if kind is slice:
        return kind, described((value.start, value.stop, value.step), name, keep)
    if isinstance(value, MethodWrapperType):
        return kind, value
    if not isinstance(value, _FIXED):
        return object()  # it may change
    keep.append(value)
    return kind, id(value)


def description(tensor: Tensor) -> Hashable:
    """Equal for tensors between which torch makes no difference before it reads their values."""
    with torch._C.DisableTorchFunction():
        if tensor.layout is not torch.strided or type(tensor) not in (FakeTensor, nn.Parameter, nn.Buffer):
            return object()
        sizes = (*tensor.shape, *tensor.stride())
        exact = tuple([size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes])
        return exact, tensor.ndim, tensor.dtype, tensor.device, tensor.requires_grad, type(tensor)


@dataclass(frozen=True)
class Known:
    """In an answer: a tensor that the layer has had before, by its name."""

    name: Hashable


@dataclass(frozen=True)
class New:
    """In an answer: a tensor that was made for it."""

    number: int
    like: Tensor
    device: torch.device
    requires_grad: bool

    def make(self, mode: FakeTensorMode) -> Tensor:
        """Another tensor like it."""
        with no_dispatch():
            tensor = FakeTensor(mode, self.like, self.device)
            return tensor.requires_grad_() if self.requires_grad else tensor


class Result(torch.autograd.Function):
    """Makes a tensor the result of an operator, in place."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, real: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor


def depends_on_data(answer: Any) -> bool:
    """Whether an answer is, or has a size that is, a number that only the tensors' values say."""
    leaves = pytree.tree_leaves(tuple(answer) if isinstance(answer, torch.Size) else answer)
    kinds = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    return any(free_unbacked_symbols(leaf) for leaf in leaves if isinstance(leaf, kinds))


def mapped(function: Callable[[Any], Any], kinds: Any, answer: Any) -> Any:
    """An answer with `function` of whatever is of these kinds in it."""
    if isinstance(answer, kinds):
        return function(answer)
    holds = isinstance(answer, (tuple, list, dict)) and not isinstance(answer, torch.Size)
    return pytree.tree_map_only(kinds, function, answer) if holds else answer
