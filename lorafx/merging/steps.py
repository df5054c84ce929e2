"""Steps: what adapters do to a parameter, a block of rows after another.

Additive kinds add to each row what does not depend on others, so a step is a block that stays near the processor.
Where another kind takes part, the whole parameter is one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..adapters.low_rank import LowRank
from ..errors import MergeError
from .scratch import Memory
from .source import Source
from .update import Rows, slices, total

# Elements a block, on a CPU for each thread: with less, calls take most of the time, and with more, memory does.
_ON_CPU, _ELSEWHERE = 2**18, 2**24


class Step(Protocol):
    """What some adapters do to a block of rows, of any dtype; results are of the dtype it computes in.

    They may lie in memory that the next result of that kind is written into.
    """

    def merged(self, rows: Tensor) -> Tensor:
        """The rows with the adapters in them."""

    def unmerged(self, rows: Tensor) -> Tensor | None:
        """The rows without them, up to rounding; None if a kind has no inverse."""


def blocks(sources: Sequence[Source], tensor: Tensor) -> list[Rows]:
    """The rows of a parameter in the blocks in which these can be merged into it."""
    if not tensor.ndim or not all(source.adapter.kind.additive for source in sources):
        return [...]
    return [*slices(tensor.shape, _ON_CPU * torch.get_num_threads() if tensor.is_cpu else _ELSEWHERE)]


def steps(sources: Sequence[Source], role: str, like: Tensor, rows: Sequence[Rows], memory: Memory) -> Iterator[Step]:
    """The steps for these blocks of rows of a parameter, computed where and as `like`, of its shape, is."""
    if not all(source.adapter.kind.additive for source in sources):
        return (yield from (_OneByOne(sources, role, like) for _ in rows))
    deltas = [_delta(source, role, like) for source in sources]
    for block in rows:
        shape = like.shape if block is ... else (block.stop - block.start, *like.shape[1:])
        yield _Sum(total(deltas, block, memory("delta", shape, like.dtype, like.device), memory), memory)


@dataclass(frozen=True)
class _Sum:
    """W + Σ ΔW"""

    delta: Tensor
    memory: Memory

    def merged(self, rows: Tensor) -> Tensor:
        rows, result = self._wide(rows, "merged")
        return torch.add(rows, self.delta, out=result)

    def unmerged(self, rows: Tensor) -> Tensor:
        rows, result = self._wide(rows, "unmerged")
        return torch.sub(rows, self.delta, out=result)

    def _wide(self, rows: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """The rows in the dtype of ΔW, and memory for a result, in which they may lie already."""
        result = self.memory(name, self.delta.shape, self.delta.dtype, self.delta.device)
        return rows if rows.dtype == result.dtype else result.copy_(rows), result


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


def _require_shape(source: Source, role: str, new: torch.Size, shape: torch.Size) -> None:
    if new != shape:
        raise MergeError(f"{getattr(source.site, role)}: adapter {source.adapter.name!r} would make {tuple(new)} of it")
