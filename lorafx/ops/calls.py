"""Calls: what an operator asks about the tensors that it is given, and about who calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..torch_private.tensors import is_within_transform
from ..tree.watched import PLAIN_TENSORS


def by_reference() -> bool:
    """Whether the call is inside a vmap or a forward-mode derivative, which need the equation in torch's operators."""
    return is_within_transform()


def needs_backward(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call with these tensors, so that somebody may ask for a gradient."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def require_values(lora_A: Tensor, x: Tensor) -> None:
    """RuntimeError for an update without values: torch adds such a one in place, and leaves memory as it finds it."""
    if lora_A.is_meta and not x.is_meta:
        raise RuntimeError("the adapter is on the meta device, which holds no values, and its input is not: load it")


def is_plain(tensor: object) -> bool:
    """Whether a value is an ordinary tensor or parameter: no subclass, and no fake or functional one of a compiler."""
    return type(tensor) in PLAIN_TENSORS


def rows(tensor: Tensor) -> Tensor:
    """A tensor as a matrix with the same last dimension."""
    return tensor.reshape(-1, tensor.shape[-1])


def without_derivative(gradient: Tensor, why: str) -> Tensor:
    """The gradient, whose derivative is a RuntimeError that says `why`.

    autograd's own `once_differentiable` lets the derivative of a loss's gradient count as zero.
    """
    return _Last.apply(gradient, torch.empty(0, requires_grad=True), why)


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, _: Tensor, why: str) -> Tensor:
        ctx.why = why
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise RuntimeError(ctx.why)
