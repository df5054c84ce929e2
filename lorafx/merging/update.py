"""Σ ΔW of a block of rows: a few of them at a time in float64, which takes twice the memory of all else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import EllipsisType

import torch
from torch import Tensor

from ..adapters.low_rank import LowRank
from .scratch import Memory, fresh

Rows = slice | EllipsisType  # some rows of a tensor; `...` are all, of a tensor that has none, too
_ON_CPU = 2**16  # elements at a time for each thread, so that they stay near the processor
_ROWS = 16  # at least, for each time the whole right factor of a ΔW is read


def slices(shape: tuple[int, ...], elements: int, least: int = 1) -> list[slice]:
    """The rows of a tensor of this shape, about so many elements at a time, and so many rows at `least`."""
    count = max(least, elements // max(1, math.prod(shape[1:])))
    return [slice(start, min(start + count, shape[0])) for start in range(0, shape[0], count)]


def total(deltas: Sequence[LowRank | Tensor], rows: Rows, result: Tensor, memory: Memory) -> Tensor:
    """Write the sum of some rows of these into `result`, rounded once."""
    for here, there in _parts(rows, result):
        shape = result[here].shape
        first, *others = (_rows(each, there, shape, fresh if number else memory) for number, each in enumerate(deltas))
        result[here].copy_(sum(others, start=first))
    return result


def _parts(rows: Rows, result: Tensor) -> list[tuple[Rows, Rows]]:
    """The rows of a result in parts, and which of the whole each part is of."""
    if rows is ... or not result.is_cpu:
        return [(..., rows)]
    parts = slices(result.shape, _ON_CPU * torch.get_num_threads(), _ROWS)
    return [(part, slice(rows.start + part.start, rows.start + part.stop)) for part in parts]


def _rows(delta: LowRank | Tensor, rows: Rows, shape: tuple[int, ...], memory: Memory) -> Tensor:
    if isinstance(delta, LowRank):
        return delta.rows(rows, memory("product", shape, torch.float64, delta.left.device))
    return delta[rows]
