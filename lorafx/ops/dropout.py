"""Dropout before an adapter's A, of which backward needs neither the result nor, on a GPU, the mask.

z = x m / (1 - p)        m: 1 with probability 1 - p, 0 otherwise

Autograd keeps m, on a CPU in the dtype of x, and z for the product that reads it. Here backward makes z of x and m
again, and 1 / (1 - p) is a part of the update's scaling. On a GPU m is drawn again too, from the state that the random
numbers had (16 bytes), unless x lies in memory in another order than the matrix that is kept of it. On a CPU drawing
takes longer than all else about dropout, so m is kept, a byte an element. The random numbers are those of torch's own
dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .calls import is_plain
from .modes import is_recorded

Redraw = Callable[[Tensor], Tensor]


def can_draw(x: Tensor, p: float) -> bool:
    """Whether dropout may go this way. A compiler, and a CUDA graph that is being captured, get torch's operator."""
    return not is_recorded() and is_plain(x) and (x.is_cpu or x.is_cuda) and 0 < p < 1


def draw(x: Tensor, p: float) -> tuple[Tensor, Redraw | None]:
    """m as booleans of the shape of x, and a function that draws it again, given x; None if m is to be kept."""
    if not (redraws(x) and x.is_contiguous()):
        return _mask(x, p), None
    state = _generator(x).get_state()
    return _mask(x, p), partial(_again, p, state)


def redraws(x: Tensor) -> bool:
    """Whether drawing a second time costs less than keeping a byte an element."""
    return x.is_cuda


def _again(p: float, state: Tensor, x: Tensor) -> Tensor:
    with torch.random.fork_rng([x.get_device()] if x.is_cuda else []):
        _generator(x).set_state(state)
        return _mask(x, p)


def _generator(x: Tensor) -> torch.Generator:
    return torch.cuda.default_generators[x.get_device()] if x.is_cuda else torch.default_generator


@torch.no_grad()
def _mask(x: Tensor, p: float) -> Tensor:
    if x.is_cuda:
        return torch.native_dropout(x, p, True)[1]
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
