"""own_forward: a module's own forward as one operator, for layers whose weight only their own code can read.

    y = module(x)        (…, in) -> (…, features), or (…) of row numbers -> (…, features)

Its derivative is that of the module's code. A compiler does not look into it: it is given an operator whose backward is
the product with W, made dense for as long as that takes, where the storage knows that it is so (`factor_of`); else it
runs the module again in backward, on x that was kept, as checkpointing does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import AdapterError, warn
from ..torch_private.tracing import FakeTensor
from ..tree.own_layers import layer_of, own_forward_of
from .calls import is_plain, rows
from .cpu import matmul
from .library import LIBRARY, composite


def own_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, number: Tensor, features: int, dtype: torch.dtype | None
) -> Tensor:
    """What the own layer of this number computes of x: (…, `features`), in `dtype`, or that of x if it is None.

    `weight` is what a site is known by, and not looked at; `bias` takes the place of the module's own. Raises
    `AdapterError` for a module that gives something else.
    """
    if isinstance(x, FakeTensor):
        return _shape(x, bias, number, features, dtype)
    if not is_plain(x):
        return torch.ops.lorafx.hidden_forward(x, bias, number, features, dtype)
    return _run(x, bias, number, features, dtype)


def _run(x: Tensor, bias: Tensor | None, number: Tensor, features: int, dtype: torch.dtype | None) -> Tensor:
    module = layer_of(number)
    forward = own_forward_of(module)
    assert forward is not None, "only own layers have numbers"
    y = forward.run(x, bias)
    wanted = dtype or x.dtype
    found = f"{y.shape[-1]} features in {y.dtype}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
    if isinstance(y, Tensor) and torch.is_autocast_enabled(x.device.type):
        y = y.to(wanted)  # autocast computes in a dtype of its own
    if not isinstance(y, Tensor) or (y.shape[-1], y.dtype) != (features, wanted):
        raise AdapterError(
            f"{type(module).__name__} gave {found} of {x.dtype}, where lorafx expected {features} features in "
            f"{wanted}; give it inputs of the dtype that it computes in, or leave it out"
        )
    return _with_its_derivative(module, x, y)


def _with_its_derivative(module: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Say where the module's code gives no derivative: adapters before it do not train, and jvp would be wrong."""
    name = type(module).__name__
    if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
        warn(f"{name} gives its input no gradient, so adapters before it do not train through it")
    if forward_ad.unpack_dual(x).tangent is not None and forward_ad.unpack_dual(y).tangent is None:
        raise AdapterError(f"{name} has no forward-mode derivative (jvp); take gradients by backward instead")
    return _NoDerivative.apply(y.detach(), torch.empty(0, requires_grad=True), name) if _lacks_one(x, y) else y


def _lacks_one(x: Tensor, y: Tensor) -> bool:
    """Whether y is computed of x by way of one operator at last of which torch has no derivative."""
    node = y.grad_fn
    while node is not None and node is not x.grad_fn and "NotImplemented" not in node.name():
        before = [each for each, _ in node.next_functions if each is not None]
        node = before[0] if len(before) == 1 else None
    return node is not None and node is not x.grad_fn


class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, _: Tensor, name: str) -> Tensor:
        ctx.name = name
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        raise AdapterError(
            f"{ctx.name} computes with an operator that has no derivative, so nothing before it can be trained: it is "
            "for inference. Quantise the base in another way, or adapt what comes after it alone"
        )


def _shape(x: Tensor, bias: Any, number: Any, features: int, dtype: torch.dtype | None) -> Tensor:
    leading = x.shape if dtype is not None and not x.is_floating_point() else x.shape[:-1]
    return x.new_empty((*leading, features), dtype=dtype or x.dtype)


def _gradients(
    dy: Tensor, x: Tensor, bias: Tensor | None, number: Tensor, features: int, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The gradients of x and bias; an empty tensor for one that there is none of."""
    factor = factor_of(number, x)
    if factor is not None:
        d_bias = x.new_empty(0) if bias is None else rows(dy).sum(0).to(bias.dtype)
        return matmul(dy.to(factor.dtype), factor).to(x.dtype), d_bias
    given = [tensor for tensor in (x, bias) if tensor is not None and tensor.is_floating_point()]
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        mine = iter(leaves)
        inner_x = next(mine) if x.is_floating_point() else x
        y = _run(inner_x, next(mine, None), number, features, dtype)
    found = iter(torch.autograd.grad(y, leaves, dy))
    dx = next(found).contiguous() if x.is_floating_point() else x.new_empty(0)
    return dx, next(found, x.new_empty(0))


def factor_of(number: Tensor, x: Tensor) -> Tensor | None:
    """W (out, in) of an own layer whose gradient by x is dy W, in the dtype of that product; None for any other."""
    module = layer_of(number)
    forward = own_forward_of(module)
    assert forward is not None, "only own layers have numbers"
    return None if forward.factor is None else forward.factor(module, x.dtype)


def _gradient_shapes(dy: Tensor, x: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, bias, number, ctx.features, ctx.dtype = inputs
    ctx.save_for_backward(x, bias, number)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, bias, number = ctx.saved_tensors
    dx, d_bias = torch.ops.lorafx.hidden_backward(dy, x, bias, number, ctx.features, ctx.dtype)
    return dx if x.is_floating_point() else None, None if bias is None else d_bias, None, None, None


_GIVEN = "Tensor x, Tensor? bias, Tensor number, SymInt features, ScalarType? dtype"
composite(
    "own_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor number, SymInt features, ScalarType? dtype) -> Tensor",
    own_forward,
)
for _name, _schema, _function, _fake in (
    ("hidden_forward", f"({_GIVEN}) -> Tensor", _run, _shape),
    ("hidden_backward", f"(Tensor dy, {_GIVEN}) -> (Tensor, Tensor)", _gradients, _gradient_shapes),
):
    LIBRARY.define(f"{_name}{_schema}")
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorafx::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd("lorafx::hidden_forward", _backward, setup_context=_keep, lib=LIBRARY)
