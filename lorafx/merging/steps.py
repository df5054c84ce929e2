"""Steps: what adapters do to a parameter, a block of rows after another.

Additive kinds add to each row what does not depend on the others, so a step is a block that stays near the processor
from first to last. Where another kind takes part, the whole parameter is one step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Protocol

import torch
from torch import Tensor

from ..adapters.low_rank import LowRank
from ..errors import MergeError
from .source import Source

# Elements a block: with less, calls take most of the time on a CPU, and with more, memory does.
_ON_CPU, _ELSEWHERE = 2**18, 2**24
Rows = slice | EllipsisType  # some rows of a tensor; `...` are all, of a tensor that has none, too


class Step(Protocol):
    """What some adapters do to a block of rows, of any dtype; results are new, and of the dtype it computes in."""

    def merged(self, rows: Tensor) -> Tensor:
        """The rows with the adapters in them."""

    def unmerged(self, rows: Tensor) -> Tensor | None:
        """The rows without them, up to rounding; None if a kind has no inverse."""


def blocks(sources: Sequence[Source], tensor: Tensor) -> list[Rows]:
    """The rows of a parameter in the blocks in which these can be merged into it."""
    if not tensor.ndim or not all(source.adapter.kind.additive for source in sources):
        return [...]
    size = _ON_CPU if tensor.is_cpu else _ELSEWHERE
    count = max(1, size // max(1, math.prod(tensor.shape[1:])))
    return [slice(start, start + count) for start in range(0, tensor.shape[0], count)]


def steps(sources: Sequence[Source], role: str, like: Tensor, rows: Sequence[Rows]) -> Iterator[Step]:
    """The steps for these blocks of rows of a parameter, computed where and as `like`, of its shape, is."""
    if not all(source.adapter.kind.additive for source in sources):
        return (yield from (_OneByOne(sources, role, like) for _ in rows))
    deltas = [_delta(source, role, like) for source in sources]
    for block in rows:
        first, *others = (each.rows(block) if isinstance(each, LowRank) else each[block] for each in deltas)
        yield _Sum(sum(others, start=first).to(like.dtype))


@dataclass(frozen=True)
class _Sum:
    """W + Σ ΔW"""

    delta: Tensor

    def merged(self, rows: Tensor) -> Tensor:
        return rows.to(self.delta.dtype) + self.delta

    def unmerged(self, rows: Tensor) -> Tensor:
        return rows.to(self.delta.dtype) - self.delta


@dataclass(frozen=True)
class _OneByOne:
    """One adapter acts on what the one before it gives."""

    sources: Sequence[Source]
    role: str
    like: Tensor

    def merged(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.like.dtype, copy=True)  # which a kind may write into, or give back
        for source in self.sources:
            rows = source.merged(self.role, rows)
            _require_shape(source, self.role, rows.shape, self.like.shape)
        return rows

    def unmerged(self, rows: Tensor) -> Tensor | None:
        found: Tensor | None = rows.to(self.like.dtype, copy=True)
        for source in reversed(self.sources):
            found = None if found is None else source.unmerged(self.role, found)
        return found


def _delta(source: Source, role: str, like: Tensor) -> LowRank | Tensor:
    delta = source.delta(role, like)
    if delta.shape != like.shape:
        _require_shape(source, role, torch.broadcast_shapes(delta.shape, like.shape), like.shape)
    return delta if isinstance(delta, LowRank) else delta.expand(like.shape)


def _require_shape(source: Source, role: str, found: torch.Size, shape: torch.Size) -> None:
    if found != shape:
        path = source.site.weight if role == "weight" else source.site.bias
        raise MergeError(f"{path}: adapter {source.adapter.name!r} would make {tuple(found)} of it")
