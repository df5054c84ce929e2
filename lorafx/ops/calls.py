"""Calls: what an operator asks about the tensors that it is given, and about who asks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..torch_private.tensors import is_within_transform


def by_reference() -> bool:
    """Whether a vmap or a forward-mode derivative is under way, which want the equation's own operators."""
    return is_within_transform()


def needs_backward(*tensors: Tensor | None) -> bool:
    """Whether somebody may ask for a gradient."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_plain(tensor: object) -> bool:
    """Whether a tensor is one of numbers in memory, and not what a compiler or a subclass puts in its place."""
    return type(tensor) in (Tensor, nn.Parameter)


def rows(tensor: Tensor) -> Tensor:
    """A tensor as a matrix with the same last dimension."""
    return tensor.reshape(-1, tensor.shape[-1])
