"""Room: a tensor of an adapter that is larger than its rank needs, and zero beyond it.

    B A = [B, 0] [A; 0]        A (r, in), B (out, r)

Zeros change nothing, and stay zeros in training: the derivative by a zero column of B is a product with a zero row of
A, and the other way round. In a convolution with groups, each group has its own columns of B and a block of rows of A,
so that there is room at the end of each block.
"""

from __future__ import annotations

import torch
from torch import Tensor


def held(room: Tensor, shape: tuple[int, ...], groups: int) -> Tensor:
    """The tensor of `shape` that a larger one holds: `room` itself, or a view of it (a copy if there are groups)."""
    return room if tuple(room.shape) == shape else _part(room, shape, groups).reshape(shape)


@torch.no_grad()
def fill(room: Tensor, value: Tensor, groups: int) -> None:
    """Put a tensor into one that is at least as large, in place, and zeros where that is larger."""
    if room.shape == value.shape:
        room.copy_(value)
        return
    part = _part(room.zero_(), tuple(value.shape), groups)
    part.copy_(value.reshape(part.shape))


def has_room(room: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a tensor of one shape can hold one of another."""
    return len(room) == len(shape) and all(size >= wanted for size, wanted in zip(room, shape))


def _part(room: Tensor, shape: tuple[int, ...], groups: int) -> Tensor:
    """The view of `room` that a tensor of `shape` takes up: (groups, shape[0] / groups, *shape[1:])."""
    part = room.unflatten(0, (groups, -1))
    for dimension, size in enumerate((shape[0] // groups, *shape[1:]), 1):
        part = part.narrow(dimension, 0, size)
    return part
