"""What torch was asked and what it answered, as far as it makes a difference to torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch


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
