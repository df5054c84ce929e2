"""Turned: adapted weights that a module turns round before it multiplies by them.

    x @ W.T  ->  linear(x, W)

What is turned stands for its weight until the call ends, so that the equations of a linear layer serve modules that
write one out. It has the weight's memory, by which a later call would know it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_TURN = (Tensor.T.__get__, Tensor.mT.__get__, Tensor.t, torch.t)  # type: ignore[attr-defined]
_SWAP = (Tensor.transpose, torch.transpose)
_PRODUCT = (Tensor.matmul, Tensor.__matmul__, torch.matmul, Tensor.mm, torch.mm)
_SUM = (Tensor.addmm, torch.addmm)


class Turned:
    """What was turned of weights in a call, by its id, and kept, for another tensor must not get that."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def made(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a function gives that turns its first argument round, a weight as it is; NotImplemented for others."""
        swaps = func in _SWAP and sorted(axis % 2 for axis in (*args[1:], *kwargs.values())) == [0, 1]
        if not (swaps or func in _TURN) or args[0].ndim != 2 or id(args[0]) in self.kept:
            return NotImplemented
        made = func(*args, **kwargs)
        self.kept[id(made)] = made
        return made

    def as_linear(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], read: Tensor) -> Any:
        """The arguments by which `linear` does what a function does with a weight that is turned; None if none do.

        x Wᵀ -> linear(x, W)         b + x Wᵀ -> linear(x, W, b)
        """
        if kwargs or len(args) < 2 or args[-1] is not read or any(each is read for each in args[:-1]):
            return None
        if func in _PRODUCT and len(args) == 2:
            return args[0], read.mT
        if func in _SUM and len(args) == 3 and args[0].ndim == 1:
            return args[1], read.mT, args[0]
        return None
