"""Whether a model asks how tensors lie in memory, as by their strides: its graph is for contiguous arguments alone.

A call is captured with copies of its arguments, and one graph serves tensors however they lie, as operators do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .frames import is_asked_by_torch

CONTIGUOUS = "contiguous"  # in a graph module's meta: whether it serves contiguous arguments alone
_ASKS = {Tensor.is_contiguous, Tensor.stride, Tensor.storage_offset}


class LayoutUse(TorchFunctionMode):
    """While active, notes in `asked` whether a model's own code asks how a tensor lies in memory."""

    asked = False

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked = self.asked or (func in _ASKS and not is_asked_by_torch())
        return func(*args, **(kwargs or {}))


def all_contiguous(leaves: Iterable[Any]) -> bool:
    """Whether all tensors among a call's leaves lie in memory in the order of their sizes."""
    return all(x.is_contiguous() for x in leaves if isinstance(x, Tensor) and x.layout is torch.strided)
