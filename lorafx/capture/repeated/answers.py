"""Answers without their tensors: what torch answered one layer, kept so that another can be answered the same.

In the place of a tensor stands `Known`, the name of one that the layer has already, or `New`, what a new one is like.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from ...torch_private.tracing import FakeTensorMode, fake_tensor


@dataclass(frozen=True)
class Known:
    """In an answer: a tensor that the layer has had before, by its name in the layer's record."""

    name: Hashable


@dataclass(frozen=True)
class New:
    """In an answer: a tensor that was made for it."""

    like: Tensor  # on the meta device: sizes, strides and dtype
    device: torch.device
    requires_grad: bool

    def make(self, mode: FakeTensorMode) -> Tensor:
        """Another tensor like it."""
        return fake_tensor(mode, self.like, self.device, self.requires_grad)


def depends_on_data(answer: Any) -> bool:
    """Whether an answer is a number, or has a tensor of a size, that only the tensors' values say."""
    leaves = pytree.tree_leaves(tuple(answer) if isinstance(answer, torch.Size) else answer)
    kinds = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    return any(free_unbacked_symbols(leaf) for leaf in leaves if isinstance(leaf, kinds))


def mapped(function: Callable[[Any], Any], kinds: Any, answer: Any) -> Any:
    """An answer in which `function` has replaced what is of these classes; most answers are a single tensor."""
    if isinstance(answer, kinds):
        return function(answer)
    holds = isinstance(answer, (tuple, list, dict)) and not isinstance(answer, torch.Size)
    return pytree.tree_map_only(kinds, function, answer) if holds else answer
